"""The trainer against a real Redis: what it asks for, when it trains, what it writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from onstream.pipeline.errors import Exit
from onstream.pipeline.loop import run_worker
from onstream.pipeline.record_codec import decode_work, encode, ids_bytes
from onstream.pipeline.records import Rollout, Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.workers.trainer.startup import trainer_stage
from tests.workers.trainer.driver import Run, dead, rollout, with_image

NAMES = (
    "step time loss loss_policy loss_teacher loss_kl reward reward_std unscored "
    "teacher_kl teacher_kl_k3 entropy ratio_mean ratio_max "
    "mismatch_mean mismatch_max mismatch_fresh_mean mismatch_fresh_max mismatch_by_staleness "
    "masked_share tail_floored_share staleness_mean staleness_max grad_norm lr "
    "tokens tokens_per_s rollouts rollouts_per_s wait_s step_s "
    "latency_generate_s latency_verify_s latency_score_s "
    "queue_verify_s queue_score_s queue_train_s "
    "completion_tokens_mean truncated_share dropped_stale dropped_other dead policy_version"
)


def test_a_fresh_run_has_a_plan_and_the_student_as_version_0_before_any_ticket(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    plan = bus.state.plan()
    assert plan is not None and plan == (job.trainer.directory.path / "plan.json").read_bytes()
    policy = bus.state.newest_policy()
    assert policy is not None and policy.number == 0
    assert (
        AutoModelForCausalLM.from_pretrained(
            job.trainer.directory.path / policy.path
        ).config.vocab_size
        == 48
    )
    assert bus.state.issued() == 0


def test_the_first_ticket_waits_for_every_stage_of_the_route_and_says_so(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    bus.state.mark_ready("generate")
    job.turn()
    assert (bus.state.issued(), job.trainer.stats.detail) == (0, "waits for verify: not ready yet")
    bus.state.mark_ready("verify")
    while not bus.state.issued():
        job.turn()
    assert bus.state.issued() == 16
    assert job.trainer.stats.detail == "step 1 of 6; waits for rollouts"


def test_a_step_publishes_a_version_and_writes_every_metric(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(1)
    policy = bus.state.newest_policy()
    assert policy is not None and policy.number == 1
    (row,) = job.rows()
    assert set(NAMES.split()) <= set(row)
    assert (row["step"], row["rollouts"], row["policy_version"], row["staleness_max"]) == (
        1,
        8,
        1,
        0,
    )
    assert row["latency_generate_s"] == pytest.approx(1.0, abs=1e-3)
    assert row["queue_verify_s"] == pytest.approx(0.5, abs=1e-3)
    assert row["latency_score_s"] is None
    assert 1.0 <= row["queue_train_s"] < 10
    assert bus.state.issued() == 24  # the window moved on by a batch
    sample = job.rows("samples.jsonl")[0]
    assert (sample["uid"], sample["completions"], sample["policy_versions"]) == (
        f"{bus.run}/1",
        ["some words"],
        [0],
    )


def test_a_run_ends_by_itself_with_a_checkpoint_that_transformers_loads_and_nothing_in_flight(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.to_the_end()
    assert job.counts() == {"issued": 48, "trained": 48}
    assert [row["step"] for row in job.rows()] == [1, 2, 3, 4, 5, 6]
    last = job.trainer.directory.path / "checkpoints/step-000006"
    trained = AutoModelForCausalLM.from_pretrained(last)
    assert {str(weight.dtype) for weight in trained.parameters()} == {"torch.float32"}
    assert AutoTokenizer.from_pretrained(last).chat_template
    assert job.trainer.stats.detail == "finished after step 6"


@pytest.mark.usefixtures("stand_in_for_vision")
def test_entries_with_images_are_acknowledged_by_the_checkpoint_after_the_one_that_settled_them(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run()
    job.ready()
    job.until(2, with_image)
    assert job.checkpoints() == ["step-000002"]
    assert set(range(1, 17)) <= set(bus.state.numbers("train"))
    job.until(4, with_image)
    assert job.checkpoints() == ["step-000002", "step-000004"]
    assert min(bus.state.numbers("train")) == 17
    job.to_the_end(with_image)
    assert job.checkpoints() == ["step-000004", "step-000006"]
    assert bus.state.numbers("train") == list(range(33, 49))


def test_a_dead_member_leaves_its_group_and_a_dead_group_is_replaced(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout | Tombstone:
        return (
            dead(ticket, version)
            if ticket.number in (2, 9, 10, 11, 12)
            else rollout(ticket, version)
        )

    job = run()
    job.ready()
    job.to_the_end(make)
    assert job.counts() == {"issued": 52, "trained": 47, "dropped": 4, "dead": 1}
    first, second, *_ = job.rows()
    assert (first["rollouts"], first["dead"]) == (7, 1)
    assert (second["rollouts"], second["dead"], second["dropped_other"]) == (8, 0, 4)


def test_a_group_that_is_too_stale_is_dropped_and_replaced_under_new_numbers(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout:
        return rollout(ticket, version=0 if ticket.number == 30 else version)

    job = run()
    job.ready()
    job.to_the_end(make)
    assert job.counts() == {"issued": 52, "trained": 48, "dropped": 4}
    assert sum(row["dropped_stale"] for row in job.rows()) == 4
    assert {line["number"] for line in job.rows("trained.jsonl") if line["fate"] == "stale"} == {
        29,
        30,
        31,
        32,
    }


def test_with_no_step_off_policy_every_rollout_is_trained_by_the_version_that_wrote_it(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(orchestrator__max_off_policy_steps=0)
    job.ready()
    asked: list[tuple[int, int]] = []

    def make(ticket: Ticket, version: int) -> Rollout:
        asked.append((ticket.min_policy_version, version))
        return rollout(ticket, version)

    job.to_the_end(make)
    assert len(asked) == 48
    assert all(least == version for least, version in asked)
    assert [row["staleness_max"] for row in job.rows()] == [0] * 6


def test_single_rollouts_are_the_unit_where_no_reward_has_a_baseline(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout | Tombstone:
        return (
            dead(ticket, version) if ticket.number == 3 else rollout(ticket, version, reward=None)
        )

    job = run(
        orchestrator__max_off_policy_steps=0,
        trainer__loss={"adv_tau": 0.0, "teacher_tau": 1.0},
        deployment__stages=["generate", "score", "train"],
        trainer__max_steps=2,
    )
    job.bus.state.mark_ready("score")
    job.ready()
    job.to_the_end(make)
    assert [row["rollouts"] for row in job.rows()] == [8, 8]
    counts = job.counts()
    assert (counts["trained"], counts["dead"]) == (16, 1)
    assert "lost" not in counts


def test_a_rollout_that_no_step_can_take_counts_as_dead_and_stops_nothing(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout:
        made = rollout(ticket, version)
        if ticket.number == 5:
            made.samples[0].generator_logprobs = made.samples[0].generator_logprobs[:-4]
        if ticket.number == 6:
            made.group = 40
        if ticket.number == 7:
            made.samples[0].generator_logprobs = b"odd"
        if ticket.number == 9:
            made.samples[0].completion_ids = ids_bytes([48] * len(made.samples[0].loss_mask))
        if ticket.number == 10:
            made.samples[0].prompt_ids = ids_bytes([2] * 3_000_000)
        return made

    job = run(trainer__max_steps=2)
    job.ready()
    job.to_the_end(make)
    assert job.counts() == {"issued": 16, "trained": 11, "dead": 5}
    reasons = {letter.number: letter.reason for letter in bus.state.dead_letters()}
    assert sorted(reasons) == [5, 6, 7, 9, 10]
    assert "expected at most the student's context of" in reasons[10]
    assert reasons[6] == "it says group 40 of 4; its number belongs to group 1 of 4"
    assert "the token ids 48 to 48; expected 0 to 47" in reasons[9]


def test_a_rollout_that_the_trainer_gave_up_is_dead_once_whenever_the_trainer_is_killed(
    run: Callable[..., Run], bus: Bus
) -> None:
    def make(ticket: Ticket, version: int) -> Rollout:
        made = rollout(ticket, version)
        if ticket.number in (3, 10):
            made.samples[0].completion_ids = ids_bytes([48] * len(made.samples[0].loss_mask))
        return made

    job = run(trainer__max_steps=3)
    job.ready()
    job.until(1, make)
    job.start()
    job.until(2, make)
    job.start()
    job.to_the_end(make)
    assert sorted(letter.number for letter in bus.state.dead_letters()) == [3, 10]
    assert job.counts() == {"issued": 24, "trained": 22, "dead": 2}


def test_a_number_that_comes_twice_is_trained_once(run: Callable[..., Run], bus: Bus) -> None:
    job = run(trainer__max_steps=1)
    job.ready()
    while not bus.state.issued():
        job.turn()
    taken = job.tickets()
    twice = [
        Move(entry.id, [Out("train", ticket.number, encode(rollout(ticket, 0)))] * 2)
        for entry, ticket in taken
    ]
    bus.streams.move("generate", twice)
    job.turn(4)
    assert job.rows()[0]["rollouts"] == 8
    assert job.counts() == {"issued": 8, "trained": 8}


@pytest.mark.usefixtures("stand_in_for_vision")
def test_a_checkpoint_is_taken_early_when_much_waits_for_it(
    run: Callable[..., Run], bus: Bus
) -> None:
    job = run(
        checkpoint__interval=1000, checkpoint__max_unacked_bytes=1 << 16, trainer__max_steps=4
    )
    job.ready()
    long = [{"role": "user", "content": "x" * 2000}]
    job.until(1, lambda ticket, version: with_image(ticket, version, messages=long))
    assert job.checkpoints() == []
    job.until(2, lambda ticket, version: with_image(ticket, version, messages=long))
    assert job.checkpoints() == ["step-000002"]


def test_tickets_wait_for_the_backlog(run: Callable[..., Run], bus: Bus) -> None:
    job = run(orchestrator__max_backlog=7)
    job.ready()
    while not bus.state.issued():
        job.turn()
    assert (
        bus.state.issued() == 16
    )  # the gate was open: it looks at what is there, not at what it adds
    job.answer(count=8)
    job.turn(3)
    assert (job.trainer.step, bus.state.issued()) == (1, 16)
    assert "orchestrator.max_backlog" in job.trainer.stats.detail
    job.answer()
    while bus.state.issued() == 16:
        job.turn()
    assert bus.state.issued() == 32


def test_a_run_of_no_steps_is_refused(run: Callable[..., Run], bus: Bus) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        run(trainer__max_steps=0)
    assert bus.state.issued() == 0


def test_what_the_state_file_says_is_complete(run: Callable[..., Run], bus: Bus) -> None:
    job = run()
    job.ready()
    job.until(4)
    state: dict[str, Any] = json.loads(
        (job.trainer.directory.path / "checkpoints/step-000004/trainer.json").read_text()
    )
    assert (state["sequence"], state["step"], state["issued"]) == (2, 4, 48)
    assert state["settled"] == {"trained": [[1, 32]]}
    assert state["before"] == [[1, 16]]
    assert state["ledger_bytes"] == (job.trainer.directory.path / "trained.jsonl").stat().st_size
    assert state["totals"]["rollouts"] == 32
    assert msgspec.json.encode(state["policy"][1])


def test_the_worker_loop_runs_it_to_its_end_and_frees_the_lease(
    run: Callable[..., Run], bus: Bus, redis_url: str
) -> None:
    job = run(delivery__lease=2, delivery__max_handle=60)
    job.ready()
    other = Bus.connect(redis_url, bus.run, consumer="generator", block_s=0.2, connect_timeout_s=5)

    def generate() -> None:
        while not other.state.finished():
            moves = []
            newest = other.state.newest_policy()
            assert newest is not None
            for entry in other.streams.read("generate", 8, block_s=0.05):
                ticket = decode_work(entry.payload)
                assert isinstance(ticket, Ticket)
                moves.append(
                    Move(
                        entry.id,
                        [Out("train", entry.number, encode(rollout(ticket, newest.number)))],
                    )
                )
            other.streams.move("generate", moves)

    generator = threading.Thread(target=generate)
    generator.start()
    settings = job.settings(
        delivery__lease=2, delivery__max_handle=60, orchestrator__max_off_policy_steps=1
    )
    try:
        assert (
            run_worker(trainer_stage(settings, bus), bus, settings.delivery, block_s=0.1) == Exit.OK
        )
    finally:
        generator.join()
        other.close()
    assert bus.lease.current is None
    counts = job.counts()
    assert counts["trained"] == 48
    assert "lost" not in counts and "duplicated" not in counts
