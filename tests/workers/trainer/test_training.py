"""The training follows from the records in their order, however they were cut into reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.run_files.ledger import Fate
from onstream.settings.root import Settings
from onstream.workers.trainer.training import Training, learner_at
from tests.workers.trainer.records import rollout, tombstone


class Notes:
    """What a training tells."""

    def __init__(self) -> None:
        self.considered_: list[int] = []
        self.settled: list[tuple[int, Fate, int]] = []

    def considered(self, record: Rollout | Tombstone, taken: float) -> None:
        self.considered_.append(record.number)

    def settle(self, numbers: Iterable[int], fate: Fate, step: int) -> None:
        self.settled += [(number, fate, step) for number in numbers]


def settings(model: Path, **loss: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"name": str(model)},
            "deployment": {"device": "cpu", "stages": ["generate", "verify", "train"]},
            "orchestrator": {"batch_size": 4, "group_size": 2, "max_off_policy_steps": 1},
            "trainer": {"max_steps": 3, "optim": {"lr": 1e-3}, "loss": loss},
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
    model: Path, records: list[Rollout | Tombstone], at_once: int
) -> tuple[Notes, list[dict[str, Any]], bytes]:
    """Feed `records`, so many at once; what was told, the metrics of each step, and the weights at
    the end.
    """
    notes = Notes()
    rows = []
    job = settings(model)
    training = Training(job, learner_at(job, None), notes, worker="tester")
    for at in range(0, len(records), at_once):
        for record in records[at : at + at_once]:
            training.take(record, 0.0)
        training.advance()
        while training.batch is not None:
            rows.append(training.conclude(training.learn()))
            training.advance()
    weights = b"".join(
        weight.numpy().tobytes() for weight in training.learner.published_state().values()
    )
    return notes, rows, weights


@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_the_same_stream_gives_the_same_steps_drops_and_weights_however_it_was_read(
    model: Path, at_once: int
) -> None:
    one_by_one, rows, weights = trained(model, stream(), 1)
    together, rows_together, weights_together = trained(model, stream(), at_once)
    assert [(row["dropped_stale"], row["dropped_other"]) for row in rows] == [
        (0, 0),
        (0, 0),
        (2, 2),
    ]
    assert rows_together == rows
    assert together.settled == one_by_one.settled
    assert together.considered_ == one_by_one.considered_
    assert weights_together == weights


def test_nothing_is_considered_while_a_batch_waits(model: Path) -> None:
    notes = Notes()
    job = settings(model)
    training = Training(job, learner_at(job, None), notes, worker="tester")
    for record in stream():
        training.take(record, 0.0)
    training.advance()
    training.advance()
    assert notes.considered_ == [1, 2, 3, 4], "the batch is complete at 4"
    training.conclude(training.learn())
    training.advance()
    assert notes.considered_ == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_seed_of_the_run_draws_what_its_learner_draws(model: Path) -> None:
    import torch

    job = settings(model)
    learner_at(job, None)
    first = torch.rand(3)
    learner_at(job, None)
    assert torch.equal(torch.rand(3), first)
    learner_at(job.model_copy(update={"run": job.run.model_copy(update={"seed": 1})}), None)
    assert not torch.equal(torch.rand(3), first)
