"""Every mode through a real trainer and real streams: what it asks for, what it trains on, and what
its metrics say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onstream.pipeline.record_codec import logprobs_bytes
from onstream.pipeline.records import Rollout, Ticket
from tests.workers.trainer.driver import Run, rollout

TEACHER: dict[str, Any] = {
    "teacher_inference__model__name": "big",
    "trainer__loss__teacher_tau": 1.0,
}
DISTILL: dict[str, Any] = {
    **TEACHER,
    "trainer__loss__adv_tau": 0.0,
    "orchestrator__verification__enabled": False,
    "deployment__stages": ["generate", "score", "train"],
}
HARD: dict[str, Any] = {
    "trainer__loss__type": "sft",
    "orchestrator__use_token_client": False,
    "orchestrator__teacher_rollout_model": {
        "client": {"base_url": ["http://a/v1"]},
        "model": {"name": "big"},
    },
}


def scored(ticket: Ticket, version: int, **changes: Any) -> Rollout:
    return rollout(ticket, version, scored_by="big", **changes)


def unscored(ticket: Ticket, version: int, **changes: Any) -> Rollout:
    made = rollout(ticket, version, **changes)
    made.samples[0].teacher_logprobs = None
    return made


def unrewarded(ticket: Ticket, version: int) -> Rollout:
    return scored(ticket, version, reward=None)


def written_by_a_teacher(ticket: Ticket, version: int, **changes: Any) -> Rollout:
    """No policy wrote it: there are no versions, and no logprobs that mean anything."""
    made = unscored(ticket, version, **changes)
    made.samples[0].version_spans = []
    made.samples[0].generator_logprobs = logprobs_bytes(np.zeros(len(made.samples[0].loss_mask)))
    return made


def test_pure_distillation_waits_for_no_verifier_and_its_metrics_have_no_reward(
    run: Callable[..., Run],
) -> None:
    job = run(**DISTILL, trainer__max_steps=2)
    for stage in ("generate", "score"):
        job.bus.state.mark_ready(stage)  # type: ignore[arg-type]
    job.to_the_end(unrewarded)
    for row in job.rows():
        assert (row["reward"], row["reward_std"], row["unscored"]) == (None, None, 0)
        assert row["teacher_kl"] is not None and row["loss_teacher"] != 0
        assert (row["dropped_stale"], row["dropped_other"], row["rollouts"]) == (0, 0, 8)
        assert row["scored_by"] == {"big": 1.0}
    assert job.counts()["trained"] == 16


def test_pure_distillation_trains_rollouts_and_not_groups(run: Callable[..., Run]) -> None:
    job = run(**DISTILL, trainer__max_steps=1, orchestrator__max_off_policy_steps=1)
    for stage in ("generate", "score"):
        job.bus.state.mark_ready(stage)  # type: ignore[arg-type]
    job.turn()
    tickets = job.tickets()
    assert {tuple(ticket.route) for _, ticket in tickets} == {("score", "train")}
    assert len(tickets) == 8 and job.trainer.training.batches.unit_size == 1


def test_pure_rl_asks_no_teacher_and_its_metrics_have_no_teacher_kl(
    run: Callable[..., Run],
) -> None:
    job = run(trainer__max_steps=2)
    job.ready()
    job.to_the_end(unscored)
    for row in job.rows():
        assert (row["teacher_kl"], row["scored_by"]) == (None, None)
        assert row["reward"] is not None and row["loss_policy"] != 0
    assert job.trainer.tickets.planner.route == ("verify", "train")


def test_the_mixed_objective_has_both_terms(run: Callable[..., Run]) -> None:
    job = run(
        **TEACHER, deployment__stages=["generate", "verify", "score", "train"], trainer__max_steps=1
    )
    for stage in ("generate", "verify", "score"):
        job.bus.state.mark_ready(stage)  # type: ignore[arg-type]
    job.to_the_end(scored)
    [row] = job.rows()
    assert job.trainer.tickets.planner.route == ("verify", "score", "train")
    assert (
        row["reward"] is not None
        and row["teacher_kl"] is not None
        and row["loss_teacher"] != 0
        and row["loss_policy"] != 0
    )


def test_hard_distillation_trains_on_what_no_policy_wrote(run: Callable[..., Run]) -> None:
    job = run(**HARD, trainer__max_steps=3)
    job.ready()
    job.to_the_end(written_by_a_teacher)
    rows = job.rows()
    assert job.trainer.tickets.planner.route == ("verify", "train")
    assert (
        3 < rows[0]["loss"] < 7
    )  # nats a token: random words under an untrained model of 48 tokens, log 48 = 3.9 at best
    for row in rows:
        assert (
            row["teacher_kl"],
            row["ratio_mean"],
            row["staleness_max"],
            row["dropped_other"],
        ) == (None, None, 0, 0)
        assert row["reward"] is not None
    assert job.counts()["trained"] == 24


def test_hard_distillation_without_verification_goes_straight_to_the_trainer(
    run: Callable[..., Run],
) -> None:
    job = run(**HARD, orchestrator__verification__enabled=False, trainer__max_steps=1)
    job.bus.state.mark_ready("generate")
    job.to_the_end(lambda ticket, version: written_by_a_teacher(ticket, version, reward=None))
    [row] = job.rows()
    assert job.trainer.tickets.planner.route == ("train",)
    assert (row["reward"], row["rollouts"]) == (None, 8)


def test_only_right_answers_are_kept_where_that_is_asked_and_the_others_are_replaced(
    run: Callable[..., Run],
) -> None:
    job = run(
        trainer__loss__type="sft",
        orchestrator__use_token_client=False,
        orchestrator__teacher_rollout_model={
            **HARD["orchestrator__teacher_rollout_model"],
            "keep": "verified",
        },
        trainer__max_steps=2,
    )
    job.ready()
    rewards = (1.0, 0.5, None)
    job.to_the_end(
        lambda ticket, version: written_by_a_teacher(
            ticket, version, reward=rewards[ticket.number % 3]
        )
    )
    rows = job.rows()
    counts = job.counts()
    assert [row["reward"] for row in rows] == [1.0, 1.0]
    assert counts["trained"] == 16
    assert counts["dropped"] == sum(row["dropped_other"] for row in rows) > 0


def test_the_status_says_when_a_teacher_is_never_right(run: Callable[..., Run]) -> None:
    job = run(
        **HARD
        | {
            "orchestrator__teacher_rollout_model": {
                **HARD["orchestrator__teacher_rollout_model"],
                "keep": "verified",
            }
        }
    )
    job.ready()
    for count, told in ((7, False), (1, True), (8, True)):
        while (
            done := job.answer(
                lambda ticket, version: written_by_a_teacher(ticket, version, reward=0.5), count
            )
        ) == 0:
            job.turn()
        assert done == count
        job.turn(2)
        assert ("completions since the last step was right" in job.trainer.stats.detail) == told
    assert "none of the 16 completions since" in job.trainer.stats.detail
    job.until(1, lambda ticket, version: written_by_a_teacher(ticket, version, reward=1.0))
    job.turn()
    assert "was right" not in job.trainer.stats.detail
