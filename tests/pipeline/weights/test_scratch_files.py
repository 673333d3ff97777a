"""Files for other processes go with their process, and those of a killed one with the next that
writes some.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

OWNER = """
import sys
import numpy as np
from safetensors.numpy import save
from onstream.pipeline.weights import LoadedPolicy
data = np.frombuffer(bytearray(save({"w": np.ones(3, dtype=np.float32)})), dtype=np.uint8)
policy = LoadedPolicy(7, None, data)
print(policy.file(), flush=True)
sys.stdin.readline()
"""


def owner(directory: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has written a policy's file, which it names."""
    environment = {
        **os.environ,
        "TMPDIR": str(directory),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin and process.stdout
    process.stdin.close()
    assert process.wait() == 0
    process.stdout.close()


def test_a_killed_process_leaves_its_files_to_the_next_one_which_spares_those_of_the_living(
    tmp_path: Path,
) -> None:
    living, file = owner(tmp_path)
    killed, left = owner(tmp_path)
    killed.kill()
    killed.wait()
    assert killed.stdin and killed.stdout
    killed.stdin.close()
    killed.stdout.close()
    assert left.exists()
    third, _ = owner(tmp_path)
    assert not left.exists()
    assert file.exists()
    end(third)
    end(living)
    assert list(tmp_path.iterdir()) == []
