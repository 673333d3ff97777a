"""A large checkpoint is written in a thread while training goes on: the same files and the same
guarantees as one that the trainer waits for.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onstream.pipeline.errors import LeaseLost
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import all_letters, dead_numbers
from onstream.workers.trainer.durability import checkpoint, checkpointing
from onstream.workers.trainer.durability.checkpointing import CheckpointTask
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from tests.waiting import LONGEST_S
from tests.workers.trainer.driver import Gate, Run, digest, killed, with_image
from tests.workers.trainer.durability.test_operator_requests import look_again, start

ALL = {"issued": 48, "trained": 48}


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "BACKGROUND_BYTES", 0)


@pytest.fixture
def late(in_background: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is copied or written before the trainer waits for it."""
    copy_wanted = threading.Event()
    wanted = threading.Event()
    wait = CheckpointTask.wait
    wait_until_copied = CheckpointTask.wait_until_copied
    copy = LearnerSnapshot.copy
    write = LearnerSnapshot.write

    def waiting(task: CheckpointTask) -> None:
        copy_wanted.set()
        wanted.set()
        wait(task)

    def waiting_for_copy(task: CheckpointTask) -> None:
        copy_wanted.set()
        wait_until_copied(task)

    def late_copy(snapshot: LearnerSnapshot) -> None:
        assert copy_wanted.wait(LONGEST_S)
        copy_wanted.clear()
        copy(snapshot)

    def late_write(snapshot: LearnerSnapshot, directory: Path) -> None:
        assert wanted.wait(LONGEST_S)
        wanted.clear()
        write(snapshot, directory)

    monkeypatch.setattr(CheckpointTask, "wait", waiting)
    monkeypatch.setattr(CheckpointTask, "wait_until_copied", waiting_for_copy)
    monkeypatch.setattr(LearnerSnapshot, "copy", late_copy)
    monkeypatch.setattr(LearnerSnapshot, "write", late_write)


@pytest.fixture
def gate(in_background: None, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds back the next checkpoint's files until it is opened."""
    found = Gate()
    write = LearnerSnapshot.write

    def held_back(snapshot: LearnerSnapshot, directory: Path) -> None:
        found.passes()
        write(snapshot, directory)

    monkeypatch.setattr(LearnerSnapshot, "write", held_back)
    return found


def finished_checkpoints(job: Run) -> list[str]:
    return [name for name in job.checkpoints() if not name.startswith(".")]


def assert_as_undisturbed(job: Run, undisturbed: str) -> None:
    assert digest(job.bus) == undisturbed
    assert job.announced() == list(range(7))
    assert job.counts() == ALL
    assert len(job.rows("trained.jsonl")) == 48
    assert job.checkpoints() == ["step-000004", "step-000006"], "nothing unfinished is left"


def test_steps_are_taken_while_a_checkpoint_is_written_and_the_next_one_waits(
    run: Callable[..., Run], undisturbed: str, gate: Gate
) -> None:
    job = run()
    job.ready()
    job.until(3)
    assert gate.reached.wait(LONGEST_S)
    assert finished_checkpoints(job) == [] and not job.trainer.checkpointing.saved(3)
    assert job.rows("metrics.jsonl")[-1]["step"] == 3
    assert not (job.trainer.directory.path / "trained.jsonl").exists(), "no line before its files"
    gate.open()
    job.to_the_end()
    assert_as_undisturbed(job, undisturbed)


@pytest.mark.parametrize("killed_after", [None, 3])
def test_checkpoints_that_are_late_hold_the_state_of_their_step(
    run: Callable[..., Run], undisturbed: str, late: None, killed_after: int | None
) -> None:
    job = run()
    job.ready()
    if killed_after is not None:
        job.until(killed_after)
        # A killed process leaves no thread, which would write here under its successor's lease.
        job.trainer.checkpoints.complete()
        assert job.start().step == 2
    job.to_the_end()
    assert_as_undisturbed(job, undisturbed)
    assert all(row["checkpoint_wait_s"] >= 0 for row in job.rows())
    assert max(row["checkpoint_wait_s"] for row in job.rows()) > 0


MODULES = {
    "copy": LearnerSnapshot,
    "write": LearnerSnapshot,
    "sync_tree": checkpoint,
    "append": checkpointing.Ledger,
    "sync": checkpoint,
    "prune": checkpoint,
}


@pytest.mark.parametrize(
    "killed_at",
    ["copy", "write", "sync_tree", "append", "rename", "sync", "prune", "trim"],
)
def test_a_kill_between_any_two_operations_is_made_good_from_the_newest_whole_one(
    run: Callable[..., Run],
    undisturbed: str,
    late: None,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: str,
) -> None:
    job = run()
    job.ready()
    job.until(3)
    job.trainer.checkpoints.complete()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed_at == "rename":
            patch.setattr(checkpoint, "os", SimpleNamespace(getpid=os.getpid, rename=killed))
        elif killed_at == "trim":
            patch.setattr(job.trainer.recording, "checkpoint_is_durable", killed)
        elif killed_at == "sync":  # the second one of a checkpoint's: of the folder
            kill_at_folder(patch)
        else:
            patch.setattr(MODULES[killed_at], killed_at, killed)
        job.until(4)
        job.trainer.checkpoints.complete()
    whole = killed_at in ("sync", "prune", "trim")
    assert ("step-000004" in job.checkpoints()) == whole
    assert job.start().step == (4 if whole else 2)
    assert len(job.rows("trained.jsonl")) == (32 if whole else 16)
    job.to_the_end()
    assert_as_undisturbed(job, undisturbed)


def kill_at_folder(patch: pytest.MonkeyPatch) -> None:
    """Kill where the folder of the checkpoints is synced, after the rename."""
    sync = checkpoint.sync

    def of_files_alone(path: Path) -> None:
        if path.name == checkpoint.FOLDER:
            killed()
        sync(path)

    patch.setattr(checkpoint, "sync", of_files_alone)


@pytest.mark.usefixtures("stand_in_for_vision")
def test_entries_with_images_wait_until_the_second_checkpoint_is_durable(
    run: Callable[..., Run], bus: Bus, gate: Gate
) -> None:
    job = run(checkpoint__interval=1)
    job.ready()
    job.until(1, with_image)
    assert gate.reached.wait(LONGEST_S)
    job.turn(2)
    assert 1 in bus.state.numbers("train"), "no checkpoint is durable"
    gate.open()
    job.trainer.checkpoints.complete()
    job.turn()
    assert 1 in bus.state.numbers("train"), "if it is torn, the trainer begins again without it"
    job.until(2, with_image)
    job.trainer.checkpoints.complete()
    job.turn()
    assert 1 not in bus.state.numbers("train")
    job.to_the_end(with_image)
    assert job.counts() == ALL


def test_a_disk_that_is_full_in_the_background_is_said_and_it_is_tried_again(
    run: Callable[..., Run],
    undisturbed: str,
    late: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(_: LearnerSnapshot, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    job = run()
    job.ready()
    job.until(1)
    with monkeypatch.context() as patch:
        patch.setattr(LearnerSnapshot, "write", full)
        job.until(3)
        job.trainer.checkpoints.complete()
    said = capsys.readouterr().out
    assert "No space left on device" in said and "the ones before stand" in said
    assert job.checkpoints() == []
    assert not job.trainer.checkpointing.saved(2)
    job.trainer.checkpointing._retry_at = 0.0
    job.to_the_end()
    assert_as_undisturbed_but_checkpoints(job, undisturbed)


def assert_as_undisturbed_but_checkpoints(job: Run, undisturbed: str) -> None:
    assert digest(job.bus) == undisturbed
    assert job.counts() == ALL
    assert len(job.rows("trained.jsonl")) == 48


def test_a_trainer_that_is_superseded_while_it_writes_leaves_no_checkpoint(
    run: Callable[..., Run], undisturbed: str, gate: Gate
) -> None:
    job = run()
    job.ready()
    job.until(2)
    old = job.trainer
    assert gate.reached.wait(LONGEST_S)
    job.start()
    gate.open()
    with pytest.raises(LeaseLost):
        old.checkpoints.complete()
    assert finished_checkpoints(job) == []
    assert not (job.trainer.directory.path / "trained.jsonl").exists()
    job.to_the_end()
    assert_as_undisturbed(job, undisturbed)


def test_a_trainer_that_drains_waits_for_the_checkpoint_under_way(
    run: Callable[..., Run], undisturbed: str, late: None
) -> None:
    job = run()
    job.ready()
    job.until(2)
    assert job.trainer.checkpointing.pending
    job.trainer.close()
    assert job.checkpoints() == ["step-000002"]
    assert job.start().step == 2
    job.until(3)
    job.trainer.close()
    assert job.checkpoints() == ["step-000002", "step-000003"]
    job.start()
    job.to_the_end()
    assert_as_undisturbed(job, undisturbed)


def test_where_memory_has_no_room_for_a_copy_the_trainer_waits_and_says_so(
    run: Callable[..., Run],
    in_background: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkpointing, "available_host_bytes", lambda: 1000)
    monkeypatch.setattr(LearnerSnapshot, "copy", killed)
    job = run(trainer__max_steps=2)
    job.ready()
    job.to_the_end()
    assert job.checkpoints() == ["step-000002"]
    assert "no memory for a copy of the checkpoint" in capsys.readouterr().out


def test_an_update_waits_until_the_checkpoint_is_copied(
    run: Callable[..., Run], late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    copy = LearnerSnapshot.copy

    def noted(snapshot: LearnerSnapshot) -> None:
        copy(snapshot)
        seen.append(snapshot._learner.steps)

    monkeypatch.setattr(LearnerSnapshot, "copy", noted)
    job = run(trainer__max_steps=4)
    job.ready()
    job.to_the_end()
    assert seen == [2, 4]


def test_a_purge_that_comes_while_a_checkpoint_is_written_waits_for_the_next_one(
    run: Callable[..., Run], gate: Gate
) -> None:
    job = start(run)
    job.until(2)
    assert gate.reached.wait(LONGEST_S)
    run_dir = job.trainer.directory.path
    [letter] = [letter for letter in all_letters(job.bus, run_dir) if letter.number == 3]
    job.bus.requests.add("purge", 3, letter.entry_id)
    look_again(job)
    gate.open()
    job.trainer.checkpoints.complete()
    assert dead_numbers(job.bus, run_dir) == {3, 10}
    job.to_the_end()
    assert dead_numbers(job.bus, run_dir) == {10}
    assert job.counts() == {"issued": 48, "trained": 46, "dropped": 1, "dead": 1}
