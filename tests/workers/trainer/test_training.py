"""The same records in the same order give the same training, however they were read."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.models.packing import SharedPrefixRow
from onstream.pipeline.records import Rollout, Timing, Tombstone
from onstream.pipeline.run_files.ledger import Settled
from onstream.settings.root import Settings
from onstream.workers.trainer.batches import train_samples
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.training import AdvanceResult, Training, learner_at
from tests.workers.trainer.records import rollout, tombstone


@dataclass
class Outcome:
    """What a stream came to: the numbers considered, those settled, the metrics, the weights."""

    considered: list[int] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    weights: bytes = b""

    def add(self, result: AdvanceResult) -> None:
        self.considered += [timed.record.number for timed in result.considered]
        self.settled += result.settled


def settings(model: Path, **loss: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"name": str(model)},
            "deployment": {"device": "cpu", "stages": ["generate", "verify", "train"]},
            "orchestrator": {"batch_size": 4, "group_size": 2, "max_off_policy_steps": 1},
            "trainer": {"max_steps": 3, "optim": {"lr": 1e-3, "warmup": 0}, "loss": loss},
        }
    )


def stream() -> list[Rollout | Tombstone]:
    """Three steps of two groups of two. Behind the second batch come a group with nobody alive, and
    one too stale by then.
    """
    versions = {
        1: 0,
        2: 0,
        3: 0,
        4: 0,
        5: 1,
        6: 1,
        7: 0,
        8: 0,
        17: 0,
        18: 0,
        11: 1,
        12: 1,
        13: 2,
        14: 2,
        15: 2,
        16: 2,
    }
    records: list[Rollout | Tombstone] = [
        rollout(number, group_size=2, versions=(written,) * (1 + number % 3), reward=number % 2)
        for number, written in versions.items()
    ]
    return [*records[:8], tombstone(9), tombstone(10), *records[8:]]


def trained(
    model: Path, records: list[Rollout | Tombstone], at_once: int, *, ahead: bool = False
) -> Outcome:
    """Feed `records`, `at_once` of them at a time; `ahead` as on a GPU."""
    outcome = Outcome()
    job = settings(model)
    learner = learner_at(job, None)
    learner.prepares_ahead = ahead
    training = Training(job, learner, worker="tester")
    for at in range(0, len(records), at_once):
        for record in records[at : at + at_once]:
            training.take(record, 0.0)
        outcome.add(training.advance())
        while training.batch is not None:
            step = training.take_step()
            outcome.settled += step.settled
            outcome.rows.append(step.row)
            outcome.add(training.advance())
    weights = training.learner.published_state().values()
    outcome.weights = b"".join(weight.numpy().tobytes() for weight in weights)
    return outcome


@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_the_same_stream_gives_the_same_steps_drops_and_weights_however_it_was_read(
    model: Path, at_once: int
) -> None:
    one_by_one = trained(model, stream(), 1)
    together = trained(model, stream(), at_once)
    dropped = [(row["dropped_stale"], row["dropped_other"]) for row in one_by_one.rows]
    assert dropped == [(0, 0), (0, 0), (2, 2)]
    assert together.rows == one_by_one.rows
    assert together.settled == one_by_one.settled
    assert together.considered == one_by_one.considered
    assert together.weights == one_by_one.weights


@pytest.mark.parametrize("microbatch", [16, 8192])
def test_what_threads_prepare_ahead_of_the_device_gives_the_same_steps_drops_and_weights(
    model: Path, microbatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Learner.pack

    def in_rows(learner: Learner, *given: Any) -> list[SharedPrefixRow]:
        learner.trainer = learner.trainer.model_copy(update={"microbatch": microbatch})
        return pack(learner, *given)

    monkeypatch.setattr(Learner, "pack", in_rows)
    decoded_by = set()
    decode = train_samples._train_sample

    def spy(*given: Any) -> TrainSample:
        decoded_by.add(threading.current_thread().name)
        return decode(*given)

    plain = trained(model, stream(), 100)
    monkeypatch.setattr(train_samples, "_train_sample", spy)
    ahead = trained(model, stream(), 100, ahead=True)
    assert ahead == plain
    assert "decode_0" in decoded_by


def test_drops_are_counted_in_the_log_and_not_told_one_by_one(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = settings(model)
    training = Training(job, learner_at(job, None), worker="tester", step=2)
    for number in range(1, 201):
        training.take(rollout(number, group_size=2, versions=(0,), reward=number % 2), 0.0)
    assert len(training.advance().settled) == 200
    told = [line for line in capsys.readouterr().out.splitlines() if "are dropped" in line]
    assert len(told) == 7
    assert "so_far=128" in told[-1] and "reason=stale" in told[-1]


def test_nothing_is_considered_while_a_batch_waits(model: Path) -> None:
    outcome = Outcome()
    job = settings(model)
    training = Training(job, learner_at(job, None), worker="tester")
    for record in stream():
        training.take(record, 0.0)
    outcome.add(training.advance())
    outcome.add(training.advance())
    assert outcome.considered == [1, 2, 3, 4], "the batch is complete at 4"
    training.take_step()
    outcome.add(training.advance())
    assert outcome.considered == [1, 2, 3, 4, 5, 6, 7, 8]


def test_records_are_considered_as_they_came_and_trained_with_the_time_they_were_taken(
    model: Path,
) -> None:
    job = settings(model)
    training = Training(job, learner_at(job, None), worker="tester")
    for record in stream()[:4]:
        training.take(record, 7.0)
    result = training.advance()
    assert [timed.record for timed in result.considered] == stream()[:4]
    assert training.batch is not None
    assert training.batch[0].rollouts[0].timings == [Timing("train", "tester", 7.0, 7.0)]


def test_the_seed_of_the_run_draws_what_its_learner_draws(model: Path) -> None:
    import torch

    job = settings(model)
    learner_at(job, None)
    first = torch.rand(3)
    learner_at(job, None)
    assert torch.equal(torch.rand(3), first)
    learner_at(job.model_copy(update={"run": job.run.model_copy(update={"seed": 1})}), None)
    assert not torch.equal(torch.rand(3), first)
