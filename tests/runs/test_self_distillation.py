"""A student under its own start that sees the answer: it rises without rewards, and not without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.answer_reader import TEMPLATE, make_answer_reader

ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "examples" / "reverse-text" / "student"
LONGEST_S = 900  # of one `onstream up`, where it would hang
SETTINGS = """
[task]
name = "reverse-text"
[deployment]
device = "cpu"
num_teacher_gpus = 1 # the student's own starting model
[inference.sampling]
max_completion = 16
[orchestrator]
batch_size = 128
group_size = 2
[trainer]
max_steps = 40
[trainer.loss]
teacher_tau = 1.0
adv_tau = 0.0
[trainer.optim]
type = "muon"
"""


def exact_before_and_after(directory: Path, student: Path, *sets: str) -> tuple[float, float]:
    """The share of held-out words that are right, before and after a run."""
    file = directory / "self.toml"
    file.write_text(SETTINGS)
    chosen = [f"model.name={student}", f"run.dir={directory}", "run.name=self", *sets]
    options = [word for value in chosen for word in ("--set", value)]
    done = subprocess.run(
        [sys.executable, "-m", "onstream", "up", str(file), *options],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode in (0, 1), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    evals = (directory / "self" / "evals.jsonl").read_text().splitlines()
    first, *_, last = [float(json.loads(line)["exact"]) for line in evals]
    return first, last


@pytest.mark.slow
@pytest.mark.timeout(3 * LONGEST_S)
@pytest.mark.rotates("recipes and self-distillation", 4, 5)
def test_a_student_learns_from_its_own_start_that_sees_the_answer_and_not_from_one_that_does_not(
    tmp_path: Path,
) -> None:
    student = make_answer_reader(STUDENT, tmp_path / "student")
    seen = tmp_path / "seen"
    control = tmp_path / "control"
    seen.mkdir()
    control.mkdir()
    before, after = exact_before_and_after(
        seen, student, f"task.teacher_prompt.template={TEMPLATE}"
    )
    assert after >= before + 0.2
    before, after = exact_before_and_after(control, student)
    assert after <= before + 0.1
