"""A recorded run whose trainer is killed again and again, and its replay by an undisturbed trainer:
the same bits.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.run_files.recording import (
    FOLDER,
    Recorder,
    RecordFrame,
    ResumeMark,
    StepMark,
    frames,
)
from onstream.workers.trainer.durability.recording import SETTINGS
from tests.modes.run import ROOT, Run
from tests.processes import worker
from tests.waiting import LONGEST_S

pytestmark = pytest.mark.slow

SEED = 20
STEPS = 24
SHORT = (
    *(
        "trainer.record=true",
        f"trainer.max_steps={STEPS}",
        "checkpoint.interval=4",
        "eval.samples=0",
        "deployment.max_restarts=5",
    ),
    *(
        "orchestrator.batch_size=32",
        "orchestrator.max_off_policy_steps=1",
        "trainer.loss.adv_tau=1",
    ),
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_trainer_killed_at_three_random_points_comes_to_the_weights_of_an_undisturbed_replay(
    tmp_path: Path,
) -> None:
    draw = random.Random(SEED)
    kills = sorted(draw.sample(range(2, STEPS - 4), 3))
    run = Run(tmp_path, ROOT / "examples/reverse-text/onstream.toml", *SHORT)
    with run.started() as up:
        for at in kills:
            run.wait_for(lambda at=at: run.steps() >= at)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.1))  # anywhere in a step, not at its end
            worker(up.pid, "trainer").kill()  # as the kernel does when memory runs out
        assert up.wait(LONGEST_S) == 0, run.said()[-3000:]
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["trained"]) == (0, 0, STEPS * 32)
    print(f"killed at steps {kills}")
    assert_equal(run, run.directory, tmp_path / "twin")
    assert_equal(
        run, stream_alone(run.directory, tmp_path / "undisturbed"), tmp_path / "undisturbed-twin"
    )
    killed = rows(run.directory)
    undisturbed = rows(tmp_path / "undisturbed-twin")
    assert [row["step"] for row in killed] == list(range(1, STEPS + 1))
    assert [
        {name: row[name] for name in other} for row, other in zip(killed, undisturbed, strict=True)
    ] == undisturbed


def assert_equal(run: Run, recorded: Path, twin: Path) -> None:
    """Replaying what `recorded` holds gives every version of the run, and the bits of its last
    checkpoint.
    """
    said = run.onstream("replay", str(recorded), "--out", str(twin), "--worst", "0")
    assert (
        f"steps 1 to {STEPS}: the weights after each of them equal the recorded ones, "
        "bit for bit; so do the metrics"
    ) in said, said
    for name in (
        f"policies/{STEPS:06d}/model.safetensors",
        f"checkpoints/step-{STEPS:06d}/model.safetensors",
    ):
        assert sha256(twin / name) == sha256(run.directory / name)


def stream_alone(run_dir: Path, to: Path) -> Path:
    """The recording of `run_dir` as one trainer would have made it that was never killed: no
    resumes, and no record twice.

    What a killed trainer had recorded and not trained, its successor took again, later: that is
    when it was taken.
    """
    taken = {
        frame.number: frame.taken
        for frame in frames(run_dir / FOLDER)
        if isinstance(frame, RecordFrame)
    }
    (to / FOLDER).mkdir(parents=True)
    shutil.copy(run_dir / FOLDER / SETTINGS, to / FOLDER)
    recorder = Recorder(to / FOLDER, 0)
    numbers = set[int]()
    opened = 0
    for frame in frames(run_dir / FOLDER):
        if isinstance(frame, RecordFrame) and frame.number not in numbers:
            numbers.add(frame.number)
            recorder.record(frame.number, taken[frame.number], frame.payload)
        elif isinstance(frame, StepMark) or (isinstance(frame, ResumeMark) and not opened):
            recorder.mark(frame, 0.0)
        opened += isinstance(frame, ResumeMark)
    recorder.close()
    assert opened >= 2, (
        "a trainer resumed the run, besides resumes that were cut away with their steps"
    )
    return to


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, but for the time of day."""
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in read]
