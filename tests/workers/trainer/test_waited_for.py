"""Which stage the trainer waited for, from timelines worked by hand."""

from __future__ import annotations

import pytest

from onstream.pipeline.records import Rollout, StageName, Timing
from onstream.workers.trainer.metrics_files import waited_for
from tests.workers.trainer.records import rollout

Spent = tuple[StageName, float, float]


def came(*spent: Spent) -> Rollout:
    record = rollout(1)
    record.timings = [Timing(stage, "worker", taken, done) for stage, taken, done in spent]
    return record


EARLY = came(("generate", 1.0, 2.0), ("score", 3.0, 4.0))
LATE = came(("generate", 11.0, 14.0), ("verify", 14.0, 14.5), ("score", 18.0, 19.0))
CASES: list[tuple[list[Rollout], dict[str, float]]] = [
    # The stream before a stage counts as the stage's: 14.5 to 18 was spent before the teacher.
    ([EARLY, LATE], {"generate": 4.0, "verify": 0.5, "score": 4.5, "train": 1.0}),
    # What the trainer had in its own hands is its own, as is what comes after.
    ([came(("generate", 5.0, 11.0), ("train", 12.0, 15.0))], {"generate": 1.0, "train": 9.0}),
    # All of it came before the wait began: the trainer was busy with records.
    ([EARLY], {"train": 10.0}),
    # A clock that is behind: what it says was done before the stage before is nothing.
    ([came(("generate", 11.0, 15.0), ("score", 12.0, 13.0))], {"generate": 5.0, "train": 5.0}),
    # A clock that is ahead: the wait is over at its end.
    ([came(("generate", 11.0, 15.0), ("score", 30.0, 31.0))], {"generate": 5.0, "score": 5.0}),
    ([came()], {"train": 10.0}),
    ([], {"train": 10.0}),
]


@pytest.mark.parametrize(("rollouts", "expected"), CASES)
def test_the_wait_is_spent_where_the_last_rollout_was(
    rollouts: list[Rollout], expected: dict[str, float]
) -> None:
    assert waited_for(rollouts, 10.0, 20.0) == pytest.approx(expected)


def test_no_wait_is_for_nobody() -> None:
    assert waited_for([LATE], 20.0, 20.0) == {}
