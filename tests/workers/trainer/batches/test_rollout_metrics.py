"""What a step tells of its rollouts, in hand-worked numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from onstream.pipeline.record_codec import logprobs_array, logprobs_bytes
from onstream.pipeline.records import Rollout, Ticket, Timing
from onstream.workers.trainer.batches.batch_builder import (
    TrainableUnit,
    drop_metrics,
    rollout_metrics,
    scored_shares,
    turns_of,
)
from onstream.workers.trainer.batches.teacher_metrics import teacher_metrics
from tests.workers.trainer.driver import rollout


def unit(*members: Rollout) -> TrainableUnit:
    return TrainableUnit(0, members, 0, {}, ())


def made(number: int, version: int = 3, **changes: Any) -> Rollout:
    return rollout(Ticket(number, 0, 4, 0, 0, 0, ["train"]), version, **changes)


def test_rewards_are_averaged_over_those_there_are() -> None:
    found = rollout_metrics(
        [
            unit(made(1, reward=1.0), made(2, reward=0.0)),
            unit(made(3, reward=None, unscored="broke")),
        ],
        3,
    )
    assert (found["rollouts"], found["reward"], found["reward_std"], found["unscored"]) == (
        3,
        0.5,
        0.5,
        1,
    )


@pytest.mark.parametrize(
    ("masks", "turns"),
    [([[1, 1]], 1), ([[1, 0, 0, 1, 1, 0, 1]], 3), ([[1, 0, 1], [1]], 3), ([[0, 1]], 1)],
)
def test_turns_are_stretches_of_the_loss_mask(masks: list[list[int]], turns: int) -> None:
    [sample] = made(1).samples
    one = made(1, samples=[replace(sample, loss_mask=bytes(mask)) for mask in masks])
    assert turns_of(one) == turns
    assert rollout_metrics([unit(one, made(2))], 3)["turns_mean"] == (turns + 1) / 2


def test_without_any_reward_there_is_no_mean() -> None:
    found = rollout_metrics([unit(made(1, reward=None))], 3)
    assert (found["reward"], found["reward_std"], found["unscored"]) == (None, None, 0)


def test_staleness_counts_from_the_version_that_takes_the_step_and_is_never_negative() -> None:
    found = rollout_metrics([unit(made(1, version=5), made(2, version=3), made(3, version=6))], 5)
    assert found["staleness_mean"] == pytest.approx(2 / 3)
    assert found["staleness_max"] == 2


def test_times_are_split_into_work_and_waiting() -> None:
    timings = [
        Timing("generate", "g", 10, 12),
        Timing("verify", "v", 12.5, 13),
        Timing("score", "t", 14, 18),
        Timing("train", "x", 19, 19),
    ]
    late = [
        Timing("generate", "g", 10, 14),
        Timing("verify", "v", 13, 15),
    ]  # two machines whose clocks differ
    found = rollout_metrics([unit(made(1, timings=timings), made(2, timings=late))], 3)
    assert {
        name: value for name, value in found.items() if name.startswith(("latency", "queue"))
    } == {
        "latency_generate_s": 3.0,
        "latency_act_s": None,
        "latency_verify_s": 1.25,
        "latency_score_s": 4.0,
        "queue_act_s": None,
        "queue_verify_s": 0.25,
        "queue_score_s": 1.0,
        "queue_train_s": 1.0,
    }


def test_each_teacher_has_its_share_of_what_was_scored() -> None:
    members = [
        made(1, scored_by="a"),
        made(2, scored_by="b"),
        made(3, scored_by="a"),
        made(4, scored_by="a"),
    ]
    assert scored_shares([unit(*members[:2]), unit(*members[2:])]) == {"a": 0.75, "b": 0.25}
    assert scored_shares([unit(made(1))]) is None


def test_each_teacher_by_name_has_its_share_its_distance_and_its_time() -> None:
    def scored(number: int, teacher: str, seconds: float, kl: float) -> Rollout:
        record = made(number, timings=[Timing(f"score:{teacher}", "t", 10, 10 + seconds)])
        sample = record.samples[0]
        generator = logprobs_array(sample.generator_logprobs)
        sample.teacher_logprobs = logprobs_bytes(generator - np.float32(kl))
        return record

    math = [scored(1, "math", 1, 0.25), scored(2, "math", 2, 0.75)]
    unscored = made(4)  # its teacher was not asked
    assert teacher_metrics([unit(*math), unit(scored(3, "code", 4, 0.5), unscored)]) == {
        "code": {"share": 0.25, "kl": pytest.approx(0.5), "latency_s": 4.0},
        "math": {"share": 0.5, "kl": pytest.approx(0.55), "latency_s": 1.5},  # of 2 and 3 tokens
    }
    assert teacher_metrics([unit(unscored)]) is None


def test_lengths_and_truncation() -> None:
    one = made(1)
    two = made(2, finish_reason="length")
    tokens = [len(record.samples[0].completion_ids) // 4 for record in (one, two)]
    found = rollout_metrics([unit(one, two)], 3)
    assert (found["completion_tokens_mean"], found["truncated_share"]) == (sum(tokens) / 2, 0.5)


def test_what_did_not_train_is_counted_by_kind() -> None:
    assert drop_metrics({"stale": 4, "dead": 1, "not_verified": 2, "group_dead": 3}) == {
        "dropped_stale": 4,
        "dropped_other": 5,
        "dead": 1,
    }
    assert drop_metrics({}) == {"dropped_stale": 0, "dropped_other": 0, "dead": 0}
