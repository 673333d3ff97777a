"""A step whose gradient is not finite: its worst rollouts are given up, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import logprobs_bytes
from onstream.pipeline.records import Rollout, Ticket
from onstream.pipeline.redis.bus import Bus
from tests.workers.trainer.driver import Run, killed, rollout
from tests.workers.trainer.durability.test_recording import assert_replays

EXPLODING = {
    "trainer__loss__max_log_ratio": 80,
    "trainer__loss__trust_region": "none",
    "orchestrator__verification__min_reward": -1e9,
    "orchestrator__verification__max_reward": 1e9,
}
"""With these, a ratio of e⁷⁵ times an advantage of 10⁸ is more than any float32."""
BAD = (11, 30)


def with_bad(*numbers: int) -> Callable[[Ticket, int], Rollout]:
    """Answers; by those of `numbers` the generator thought each of its tokens impossible."""

    def make(ticket: Ticket, version: int) -> Rollout:
        made = rollout(ticket, version)
        if ticket.number in numbers:
            [sample] = made.samples
            sample.generator_logprobs = logprobs_bytes([-78.0] * len(sample.loss_mask))
            made.reward = 1e8 * (1 + ticket.number % 4)
        return made

    return make


def letters(bus: Bus) -> list[int]:
    return [letter.number for letter in bus.state.dead_letters()]


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_step_is_tried_again_without_its_worst_rollouts_and_replays_to_the_same_bits(
    run: Callable[..., Run], bus: Bus, lora: dict[str, Any] | None
) -> None:
    job = run(**EXPLODING, trainer__record=True, trainer__lora=lora)
    job.ready()
    job.to_the_end(with_bad(*BAD))
    assert letters(bus) == list(BAD)
    reason = bus.state.dead_letters()[0].reason
    assert reason.startswith("the gradient norm of step 2 was ")
    assert "the loss of this rollout was" in reason
    assert job.counts() == {"issued": 48, "trained": 46, "dead": 2}
    assert [row["rollouts"] for row in job.rows()] == [8, 7, 8, 7, 8, 8]
    assert [row["dead"] for row in job.rows()] == [0, 1, 0, 1, 0, 0]
    job.close_files()
    assert_replays(job)


def test_a_trainer_killed_before_the_second_try_leaves_one_dead_letter_and_no_rollout_lost(
    run: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run(**EXPLODING, trainer__record=True)
    job.ready()
    job.until(1, with_bad(*BAD))
    learner = job.trainer.training.learner
    step = learner.step
    tries: list[int] = []

    def step_once(*args: Any, **options: Any) -> Any:
        tries.append(len(args[0]))
        return step(*args, **options) if len(tries) == 1 else killed()

    monkeypatch.setattr(learner, "step", step_once)
    with pytest.raises(KeyboardInterrupt):
        job.until(2, with_bad(*BAD))
    assert (tries, letters(bus)) == ([8, 7], [11])
    job.start()
    job.to_the_end(with_bad(*BAD))
    assert letters(bus) == list(BAD)
    assert job.counts() == {"issued": 48, "trained": 46, "dead": 2}
    job.close_files()
    assert_replays(job)


def test_a_run_whose_second_try_fails_stops_and_never_forms_the_same_batch_again(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(**EXPLODING, trainer__max_bad_rollouts=2)
    job.ready()
    first_batch = with_bad(*range(1, 9))
    for stops in (1, 2, 3):
        with pytest.raises(UserError, match=r"the gradient norm of step 1 is (inf|nan)") as stop:
            job.until(1, first_batch)
        assert "onstream dead list" in str(stop.value)
        assert len(set(letters(bus))) == len(letters(bus)) == 2 * stops
        job.start()
    job.to_the_end(first_batch)
    assert sorted(letters(bus)) == list(range(1, 9))
    assert "lost" not in job.counts()


def test_with_no_rollout_to_give_up_the_run_stops_at_once(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(**EXPLODING, trainer__max_bad_rollouts=0)
    job.ready()
    with pytest.raises(UserError, match="the gradient norm of step 2 is"):
        job.until(3, with_bad(11))
    assert letters(bus) == []


def test_a_reward_out_of_bounds_is_a_dead_letter_of_the_trainer(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout:
        made = rollout(ticket, version)
        if ticket.number == 3:
            made.reward = 1e8
        return made

    job = run(trainer__max_steps=2)
    job.ready()
    job.to_the_end(make)
    [letter] = bus.state.dead_letters()
    assert (letter.number, letter.stage) == (3, "train")
    assert letter.reason.startswith("the reward is 1e+08; expected -10000 to 10000 (orchestrator.")
    assert job.counts() == {"issued": 16, "trained": 15, "dead": 1}
