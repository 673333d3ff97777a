"""`onstream up` with two teachers by name: each scores its own rows, and one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onstream.pipeline.errors import Exit

ROOT = Path(__file__).parents[2]
PAIR = ROOT / "examples" / "reverse-text"
LONGEST_S = 400
SETTINGS = f"""
[run]
name = "mixture"
[model]
name = "{PAIR / "student"}"
[task]
name = "jsonl"
[deployment]
device = "cpu"
[inference.sampling]
max_completion = 16
[orchestrator]
batch_size = 16
group_size = 2
[eval]
samples = 0
[trainer]
max_steps = 60
[trainer.loss]
teacher_tau = 1.0
adv_tau = 0.0
[teachers.early.local.model]
name = "{PAIR / "teacher"}"
[teachers.late.local.model]
name = "{PAIR / "teacher"}"
"""


def worker_of(teacher: str, run_dir: Path) -> int:
    """The process of the one worker of `teacher` that belongs to the run in `run_dir`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if teacher in words and any(str(run_dir) in word for word in words):
                return int(process.name)
    raise AssertionError(f"no worker of {teacher}")


@pytest.mark.slow
@pytest.mark.timeout(LONGEST_S)
@pytest.mark.rotates("a run of episodes, or of teachers by name", 2, 3)
def test_each_row_is_scored_by_the_teacher_that_it_names_though_one_is_killed(
    tmp_path: Path,
) -> None:
    words = ["stone", "river", "cloud", "field", "light", "night", "table", "water"]
    rows = [
        {"prompt": f"Reverse: {word}", "answer": word[::-1], "teacher": teacher}
        for word in words
        for teacher in ("early", "late")
    ]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "mixture.toml"
    file.write_text(SETTINGS)
    sets = ["--set", f"run.dir={tmp_path}", "--set", f"task.path={problems}"]
    command = [sys.executable, "-m", "onstream"]
    metrics = tmp_path / "mixture" / "metrics.jsonl"
    run = subprocess.Popen(
        [*command, "up", str(file), *sets],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not metrics.exists() or not metrics.read_text():
            assert run.poll() is None, run.stdout and run.stdout.read()
            time.sleep(0.1)
        os.kill(worker_of("late", tmp_path), signal.SIGKILL)
        out, _ = run.communicate(timeout=LONGEST_S)
    finally:
        run.kill()
    assert run.returncode in (Exit.OK, Exit.FAILED), out[-3000:]
    steps = [json.loads(line)["teachers"] for line in metrics.read_text().splitlines()]
    assert len(steps) == 60 and set().union(*steps) == {"early", "late"}
    audit = subprocess.run(
        [*command, "audit", str(tmp_path / "mixture")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(audit.stdout)
    assert (found["lost"], found["duplicated"]) == (0, 0)
