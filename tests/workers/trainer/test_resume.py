"""A trainer that was killed, drained, replaced or robbed of its data: nothing lost, nothing trained
twice, the same bits.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onstream.pipeline.errors import Exit, LeaseLost, UserError
from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import Rollout, Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import LeaseHeld
from onstream.pipeline.redis.streams import Move, Out
from onstream.settings.plan import Plan
from onstream.workers.trainer.durability import checkpoint, checkpointing
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from tests.workers.trainer.driver import Run, dead, digest, killed, rollout, with_image


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_trainer_goes_on_to_the_same_bits_and_announces_no_version_twice(
    run: Callable[..., Run], bus: Bus, undisturbed: str, killed_at: int
) -> None:
    job = run()
    job.ready()
    job.until(killed_at)
    issued = bus.state.issued()
    trainer = job.start()
    assert trainer.step == killed_at - killed_at % 2
    assert bus.state.issued() == issued
    job.to_the_end()
    assert digest(bus) == undisturbed
    assert job.announced() == [0, 1, 2, 3, 4, 5, 6]
    assert job.counts() == {"issued": 48, "trained": 48}
    assert [row["step"] for row in job.rows()] == [1, 2, 3, 4, 5, 6]
    assert len(job.rows("trained.jsonl")) == 48


def test_a_kill_between_the_announcement_and_the_metrics_is_made_good(
    run: Callable[..., Run], bus: Bus, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run()
    job.ready()
    job.until(2)
    monkeypatch.setattr(job.trainer.metrics, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        job.until(3)
    assert digest_of(job, 3) is not None
    job.start()
    job.to_the_end()
    assert digest(bus) == undisturbed
    assert job.announced() == [0, 1, 2, 3, 4, 5, 6]


def digest_of(job: Run, number: int) -> str | None:
    return next(
        (policy.digest for policy in job.bus.state.announced_policies() if policy.number == number),
        None,
    )


def test_a_kill_between_the_checkpoint_and_its_acknowledgements_repeats_neither(
    run: Callable[..., Run], bus: Bus, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run()
    job.ready()
    job.until(3)
    monkeypatch.setattr(job.trainer.checkpointing, "acknowledge", killed)
    with pytest.raises(KeyboardInterrupt):
        job.until(4)
        job.turn()
    assert job.checkpoints() == ["step-000002", "step-000004"]
    assert 32 in bus.state.numbers("train")
    job.start()
    assert job.trainer.step == 4
    job.to_the_end()
    assert digest(bus) == undisturbed
    assert job.counts() == {"issued": 48, "trained": 48}


def test_a_kill_between_the_ledger_and_the_checkpoint_leaves_no_line_behind(
    run: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run()
    job.ready()
    job.until(1)
    at_the_rename = SimpleNamespace(getpid=os.getpid, rename=killed)
    monkeypatch.setattr(checkpoint, "os", at_the_rename)
    with pytest.raises(KeyboardInterrupt):
        job.until(2)
    assert len(job.rows("trained.jsonl")) == 16
    monkeypatch.undo()
    job.start()
    assert job.rows("trained.jsonl") == []
    job.to_the_end()
    assert len(job.rows("trained.jsonl")) == 48


def test_a_torn_checkpoint_is_an_error_in_the_log_and_the_one_before_it_is_used(
    run: Callable[..., Run], bus: Bus, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run()
    job.ready()
    job.until(4)
    job.turn()
    weights = job.trainer.directory.path / "checkpoints/step-000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    trainer = job.start()
    assert trainer.step == 2
    said = capsys.readouterr().out
    assert "checkpoint is torn" in said and "model.safetensors does not have the digest" in said
    assert bus.state.issued() == 48 and "issuing them again" not in said
    job.to_the_end()
    assert digest(bus) == undisturbed
    assert job.checkpoints() == ["step-000004", "step-000006", "torn-step-000004"]
    assert job.counts() == {"issued": 48, "trained": 48}


@pytest.mark.parametrize("journal_is_lost", [True, False])
def test_a_fall_back_by_more_than_one_issues_again_what_the_journal_has_not(
    run: Callable[..., Run], bus: Bus, capsys: pytest.CaptureFixture[str], journal_is_lost: bool
) -> None:
    job = run(checkpoint__keep=3)
    job.ready()
    job.until(6)
    job.turn()
    for name in ("step-000004", "step-000006"):
        (job.trainer.directory.path / "checkpoints" / name / "manifest.json").unlink()
    if journal_is_lost:
        shutil.rmtree(job.trainer.directory.path / "journal")
    trainer = job.start()
    assert trainer.step == 2
    said = capsys.readouterr().out
    assert ("count=32" in said and "[(17, 48)]" in said) == journal_is_lost
    job.until(6)
    job.turn(2)
    assert job.counts() == {"issued": 48, "trained": 48}


def test_an_empty_redis_is_filled_again_from_the_checkpoint(
    run: Callable[..., Run], bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run()
    job.ready()
    job.until(4)
    job.turn()
    job.lose_redis()
    bus.connection.create_groups()
    job.start()
    assert "redis lost data" in capsys.readouterr().out
    assert bus.state.issued() == 48
    job.ready()
    job.turn(20)
    assert sorted(bus.state.numbers("generate")) == list(range(33, 49))
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def test_a_number_lost_in_the_middle_of_a_step_is_issued_again_as_it_was(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    while not bus.state.issued():
        job.turn()
    ((entry, ticket),) = job.tickets(count=1)
    bus.streams.move("generate", [Move(entry.id, [])])
    job.start()
    job.turn(10)
    again = [found for _, found in job.tickets() if found.number == 1]
    assert again == [ticket]


def test_a_dead_letter_whose_tombstone_went_with_a_lost_checkpoint_stays_dead(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(trainer__max_steps=2)
    job.ready()
    while not bus.state.issued():
        job.turn()
    ((entry, ticket),) = job.tickets(count=1)
    bus.streams.move(
        "generate", [Move(entry.id, [Out("dead", 1, encode(ticket), "the test killed it")])]
    )
    job.start()
    job.to_the_end()
    assert job.counts() == {"issued": 16, "trained": 15, "dead": 1}


def test_a_drain_checkpoints_at_any_step_and_gives_nothing_back(
    run: Callable[..., Run], bus: Bus, undisturbed: str
) -> None:
    job = run(checkpoint__interval=1000)
    job.ready()
    job.until(3)
    job.answer(count=3)  # of the four of a group
    job.turn()
    job.trainer.close()
    assert job.checkpoints() == ["step-000003"]
    assert bus.state.pending_counts()["train"] == 3
    assert job.start().step == 3
    job.to_the_end()
    assert digest(bus) == undisturbed


def test_a_drain_with_nothing_new_writes_no_checkpoint(run: Callable[..., Run], bus: Bus) -> None:
    job = run()
    job.trainer.close()
    assert job.checkpoints() == []


def test_a_finished_run_goes_on_when_max_steps_is_raised_and_the_change_is_recorded(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(trainer__max_steps=4)
    job.ready()
    job.to_the_end()
    job.start(trainer__max_steps=4)
    job.turn()
    assert bus.state.finished()
    assert job.checkpoints() == ["step-000002", "step-000004"]
    job.start(trainer__max_steps=6)
    assert not bus.state.finished()
    (change,) = job.rows("changes.jsonl")
    assert {name: change[name] for name in ("step", "name", "from", "to")} == {
        "step": 4,
        "name": "trainer.max_steps",
        "from": 4,
        "to": 6,
    }
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def test_a_changed_run_setting_is_refused_by_name_with_both_values(run: Callable[..., Run]) -> None:
    job = run()
    with pytest.raises(
        UserError, match=r"orchestrator\.group_size \(here 2, the run has 4\)"
    ) as refused:
        job.start(orchestrator__group_size=2)
    assert refused.value.exit == Exit.REFUSED
    shutil.rmtree(job.trainer.directory.path / "checkpoints", ignore_errors=True)
    job.lose_redis()
    with pytest.raises(UserError, match=r"run\.seed"):  # plan.json alone will do
        job.start(run__seed=6)


def test_a_route_that_changed_is_refused_with_the_number_in_flight(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(2)
    with pytest.raises(
        UserError, match=r"rollouts would go by train; run .* has 16 in flight by verify → train"
    ):
        job.start(deployment__stages=["generate", "train"])


def test_never_refuses_a_run_that_exists_and_must_one_that_does_not(
    bus: Bus, model: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    with pytest.raises(UserError, match="exists neither in"):
        run(run__resume="must")
    run().start(run__resume="must")
    with pytest.raises(UserError, match=r"run\.resume = 'never'"):
        run(run__resume="never")


def test_a_second_trainer_stops_and_names_who_holds_the_lease(
    run: Callable[..., Run], redis_url: str, bus: Bus, model: Path, tmp_path: Path
) -> None:
    run(delivery__lease=30)
    other = Bus.connect(redis_url, bus.run, consumer="second", block_s=0.2, connect_timeout_s=5)
    with pytest.raises(LeaseHeld, match="tester on "):
        Run(other, model, tmp_path)
    other.close()


def test_a_revived_trainer_beside_its_successor_writes_nothing(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(1)
    stopped = job.worker
    job.start()
    while job.trainer.step < 2:
        job.answer(count=8)
        job.turn()
    policy = bus.state.newest_policy()
    rows = job.rows()
    ledger = job.rows("trained.jsonl")
    with pytest.raises(LeaseLost):
        for _ in range(10):
            stopped.turn()
    old = job.trainers[0]
    assert old.step == 1
    with pytest.raises(LeaseLost):
        old.close()
    assert (bus.state.newest_policy(), job.rows(), job.rows("trained.jsonl")) == (
        policy,
        rows,
        ledger,
    )
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def full_disk(_: LearnerSnapshot, path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"half of")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_training_goes_on_when_a_checkpoint_finds_the_disk_full_and_it_is_tried_again(
    run: Callable[..., Run],
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock(monkeypatch)
    job = run()
    job.ready()
    job.until(3)
    room = LearnerSnapshot.write
    monkeypatch.setattr(LearnerSnapshot, "write", full_disk)
    job.until(5)
    said = capsys.readouterr().out
    assert (
        "No space left on device" in said and "the ones before stand, and training goes on" in said
    )
    assert job.checkpoints() == ["step-000002"]
    assert len(job.rows("trained.jsonl")) == 16
    monkeypatch.setattr(LearnerSnapshot, "write", room)
    clock.now += 60
    job.turn()
    assert job.checkpoints() == ["step-000002", "step-000005"]
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}


def test_a_disk_that_stays_full_stops_the_trainer_with_the_reason_and_loses_nothing(
    run: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    job = run(trainer__max_steps=2)
    job.ready()
    monkeypatch.setattr(LearnerSnapshot, "write", full_disk)
    with pytest.raises(
        UserError,
        match=r"could not be written to .*No space left on device.* Free space and start again",
    ):
        for _ in range(100):
            job.answer()
            job.turn()
            clock.now += 60
    monkeypatch.undo()
    job.start()
    job.to_the_end()
    assert job.counts() == {"issued": 16, "trained": 16}


@pytest.mark.usefixtures("stand_in_for_vision")
def test_training_waits_when_no_checkpoint_succeeds_and_entries_with_images_reach_their_bound(
    run: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    job = run(checkpoint__max_unacked_bytes=1 << 16, trainer__max_steps=20)
    job.ready()

    long = [{"role": "user", "content": "x" * 2000}]
    monkeypatch.setattr(LearnerSnapshot, "write", full_disk)
    for _ in range(40):
        job.answer(lambda ticket, version: with_image(ticket, version, messages=long), count=8)
        job.turn()
    assert job.trainer.step == 3  # eight of them take 22 KB of Redis
    assert job.trainer.stats.detail == "waits for a checkpoint: none could be written, see the log"


class Clock:
    """The clock of the checkpointing, which the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_a_ledger_that_went_missing_is_written_anew_from_the_checkpoint(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout | Tombstone:
        return dead(ticket, version) if ticket.number == 3 else rollout(ticket, version)

    job = run()
    job.ready()
    job.until(4, make)
    (job.trainer.directory.path / "trained.jsonl").unlink()
    job.start()
    lines: list[dict[str, Any]] = job.rows("trained.jsonl")
    assert sorted(line["number"] for line in lines) == list(range(1, 33))
    assert [line["number"] for line in lines if line["fate"] == "dead"] == [3]
    job.to_the_end(make)
    assert job.counts() == {"issued": 48, "trained": 47, "dead": 1}


def test_other_weights_under_an_announced_number_are_announced_anew(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(3)
    job.start(trainer__optim__lr=1e-2)  # what is replayed from step 2 differs now
    job.until(3)
    assert job.announced() == [0, 1, 2, 3, 3]
    assert (
        json.loads((job.trainer.directory.path / "changes.jsonl").read_text())["name"]
        == "trainer.optim.lr"
    )
    job.to_the_end()
    assert job.announced() == [0, 1, 2, 3, 3, 4, 5, 6]


def test_the_plan_keeps_the_number_of_an_automatic_learning_rate_and_a_resume_goes_on_with_it(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(trainer__optim__lr="auto")
    job.ready()
    job.until(3)
    stored = bus.state.plan()
    assert stored is not None
    assert Plan.decode(stored).run_settings["trainer.optim.lr"] == 1e-4
    job.start(trainer__optim__lr="auto")
    job.until(3)
    assert not (job.trainer.directory.path / "changes.jsonl").exists()
    assert {row["lr"] for row in job.rows("metrics.jsonl")} == {1e-4}
