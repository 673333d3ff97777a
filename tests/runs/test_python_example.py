"""The README's Python example, on real workers, cut short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 2


@pytest.mark.slow
def test_the_readmes_python_example_trains_a_run_and_prints_what_it_says(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    cut = example.replace("max_steps=20", f"max_steps={STEPS}")
    assert cut != example
    script = tmp_path / "example.py"
    script.write_text(f"{cut}\nprint(newest, directory)\n")
    # Only what makes it cheaper: it is the same for the script and for the workers.
    environ = {"ONSTREAM_RUN__DIR": str(tmp_path), "ONSTREAM_EVAL__SAMPLES": "8"}

    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=os.environ | environ, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    *_, first, second, one, two, three, four, result, newest = done.stdout.splitlines()
    assert [line.split()[0] for line in (first, second)] == ["1", "2"]
    assert all(" → " in sample for sample in (one, two, three, four))
    assert "'samples': 8" in result
    assert "'trained': 256" in result and "'lost': 0" in result
    assert newest == f"{STEPS} {tmp_path / 'from-python' / 'policies' / '000002'}"
