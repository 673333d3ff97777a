"""The learning rate, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from onstream.workers.trainer.maths.scalars import learning_rate


def rates(steps: int, **arguments: Any) -> list[float]:
    defaults = {
        "peak": 1.0,
        "warmup": 0,
        "max_steps": steps,
        "schedule": "constant",
        "min_ratio": 0.0,
    }
    return [learning_rate(step, **{**defaults, **arguments}) for step in range(1, steps + 1)]


def test_a_warm_up_rises_in_equal_parts_and_its_last_step_has_the_peak() -> None:
    assert rates(6, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_schedule_ends_at_the_given_share() -> None:
    assert rates(5, warmup=1, schedule="linear", min_ratio=0.2) == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_a_cosine_is_half_way_down_in_the_middle() -> None:
    assert rates(4, schedule="cosine") == pytest.approx([0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_steps_past_the_end_keep_the_lowest_rate() -> None:
    assert learning_rate(
        50, peak=1.0, warmup=0, max_steps=10, schedule="linear", min_ratio=0.1
    ) == pytest.approx(0.1)
