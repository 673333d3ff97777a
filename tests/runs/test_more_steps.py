"""A finished run that is given more steps goes on, each time, with real workers.

`EXTENDED_RUNS` is how many new runs are made, and `EXTENSIONS` how often each is extended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = int(os.environ.get("EXTENDED_RUNS", "1"))
EXTENSIONS = int(os.environ.get("EXTENSIONS", "1"))
STEPS = 2
LONGEST_S = 600  # of one `onstream up`, where it would hang


def up(directory: Path, steps: int) -> str:
    sets = [f"run.dir={directory}", f"trainer.max_steps={steps}", "eval.samples=0"]
    options = [word for value in sets for word in ("--set", value)]
    example = "examples/reverse-text/onstream.toml"
    done = subprocess.run(
        [sys.executable, "-m", "onstream", "up", example, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout((1 + EXTENSIONS) * LONGEST_S)
@pytest.mark.parametrize("number", range(RUNS))
def test_a_finished_run_that_is_given_more_steps_goes_on(tmp_path: Path, number: int) -> None:
    said = up(tmp_path, STEPS)
    for steps in range(STEPS + 1, STEPS + 1 + EXTENSIONS):
        said = up(tmp_path, steps)
        assert "restarting" not in said
        report = json.loads((tmp_path / "reverse-text" / "report.json").read_text())
        assert report["steps"] == steps
