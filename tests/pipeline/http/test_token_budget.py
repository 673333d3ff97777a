"""Tokens are counted over the whole run."""

from __future__ import annotations

from onstream.pipeline.http import TokenBudget
from onstream.pipeline.redis.bus import Bus

SETTING = "orchestrator.teacher_model.client.max_tokens_per_run"


def budget(bus: Bus, most: int | None) -> TokenBudget:
    made = TokenBudget(bus.scores, "score", most, SETTING)
    made.open()
    return made


def test_a_spent_budget_is_named(bus: Bus) -> None:
    one = budget(bus, 14)
    one.spend(7)
    assert (one.problem(), one.problem(7)) == ("", "")
    one.spend(7)
    assert (
        one.problem()
        == f"the budget is spent: 14 of {SETTING} = 14 tokens; raise it and start this worker again"
    )


def test_a_budget_is_shared_by_the_workers_of_a_stage_and_outlives_them(bus: Bus) -> None:
    first = budget(bus, 20)
    first.spend(14)
    first.report()
    restarted = budget(bus, 20)
    assert (restarted.own, restarted.allows(6), restarted.allows(7)) == (14, True, False)
    bus.connection.consumer = "another"
    second = budget(bus, 20)
    assert (second.own, second.allows(6), second.allows(7)) == (0, True, False)
    second.spend(6)
    second.report()
    first.spend(1)
    bus.connection.consumer = "tester"
    first.report()
    assert (first.spent, first.allows()) == (21, False), "it learns of the others when it tells"


def test_without_a_bound_all_is_allowed_and_nothing_told(bus: Bus) -> None:
    free = budget(bus, None)
    free.spend(10**12)
    free.report()
    assert (free.own, free.allows(10**12), free.problem()) == (10**12, True, "")
    assert bus.scores.own_spent_tokens("score") == 0
