"""A run in which nothing that comes can be trained on stops, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import Rollout, Ticket, Tombstone
from tests.workers.trainer.driver import Answer, Run, rollout

# Rewards alone would train, as without a teacher; 16 rollouts in four groups, and 8 on their way.
RULES: dict[str, Any] = {
    "trainer__loss": {"teacher_tau": 0.0, "adv_tau": 1.0},
    "orchestrator__max_dropped_groups": 4,
}
REASON = "TypeError: score() takes 1 positional argument but 2 were given (my_scorer.py:3)"


def unscored(ticket: Ticket, version: int) -> Rollout:
    return rollout(ticket, version, reward=None, unscored=REASON)


def stale(ticket: Ticket, version: int) -> Rollout:
    return rollout(ticket, version - 9)


def dead(ticket: Ticket, version: int) -> Tombstone:
    return Tombstone(ticket.number, "generate", "the prompt has 900 tokens; the context has 512")


def until_it_stops(job: Run, make: Answer, most: int = 100) -> UserError:
    job.ready()
    with pytest.raises(UserError) as caught:
        for _ in range(most):
            job.answer(make, count=4)
            job.turn()
    return caught.value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (unscored, f"24 not_verified (unscored: {REASON})"),
        (dead, "24 group_dead (the prompt has 900 tokens; the context has 512)"),
    ],
)
def test_a_run_whose_every_rollout_is_dropped_stops_with_the_reason(
    run: Callable[..., Run], make: Answer, words: str
) -> None:
    problem = until_it_stops(run(**RULES), make)
    assert problem.exit is Exit.REFUSED
    assert problem.got == f"none of the last 24 rollouts could be trained on: {words}"
    assert "orchestrator.max_dropped_groups" in problem.next_step


def test_a_run_whose_rollouts_are_all_stale_stops(run: Callable[..., Run]) -> None:
    job = run(**RULES, orchestrator__max_off_policy_steps=1)
    job.ready()
    job.until(2)
    with pytest.raises(UserError, match=r"none of the last 24 rollouts .*: 24 stale"):
        for _ in range(100):
            job.answer(lambda ticket, version: rollout(ticket, 0), count=4)
            job.turn()
    assert job.trainer.step < 6


def test_a_run_that_stopped_so_goes_on_from_there_once_it_is_mended(
    run: Callable[..., Run],
) -> None:
    job = run(**RULES)
    until_it_stops(job, unscored)
    assert job.counts()["dropped"] == 24
    job.start()
    job.to_the_end()
    assert [row["dropped_other"] for row in job.rows()] == [24, 0, 0, 0, 0, 0]
    assert job.counts()["trained"] == 48


def test_one_rollout_that_trains_starts_the_count_anew_and_0_turns_it_off(
    run: Callable[..., Run],
) -> None:
    def mostly_unscored(ticket: Ticket, version: int) -> Rollout:
        good = ticket.number % 20 == 1
        return rollout(ticket, version) if good else unscored(ticket, version)

    job = run(**RULES)
    job.ready()
    job.until(2, mostly_unscored)
    job = run(**{**RULES, "orchestrator__max_dropped_groups": 0})
    for _ in range(40):
        job.answer(unscored, count=4)
        job.turn()
    assert job.trainer.step == 2
