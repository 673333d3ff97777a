from __future__ import annotations

from typing import Any

import pytest

from onstream.pipeline.models.cost import StepCost, step_cost


def cost(**changed: Any) -> StepCost:
    """Four rollouts of ten tokens, two at once, by a billion parameters under two billion."""
    plain = {
        "student": 10**9,
        "teacher": 2 * 10**9,
        "rollouts": 4,
        "completion_tokens": 10,
        "slots": 2,
        "cache_bytes": 10**6,
        "adapter": False,
        "recompute": False,
    }
    return step_cost(**{**plain, **changed})


def test_a_step_worked_out_by_hand() -> None:
    """Half of 3.35e12 bytes a second, and .3 of 989e12 products.

    Decoding takes 2 × 10 steps that read 2e9 bytes, and for 40 tokens the 5e6 of those before.
    """
    step = cost()
    assert step.tokens == 40
    assert step.generate_s == pytest.approx((4e10 + 2e8) / 1.675e12)
    assert step.score_s == pytest.approx(1.6e11 / 2.967e14)
    assert step.train_s == pytest.approx(2.4e11 / 2.967e14)
    assert step.seconds == pytest.approx(step.generate_s + step.score_s + step.train_s)


@pytest.mark.parametrize(
    ("changed", "products"),
    [
        ({"adapter": True}, 4),
        ({"recompute": True}, 8),
        ({"adapter": True, "recompute": True}, 6),
    ],
)
def test_an_adapter_saves_the_gradients_of_the_weights_and_recomputing_costs_a_pass(
    changed: dict[str, bool], products: int
) -> None:
    assert cost(**changed).train_s == pytest.approx(products * 4e10 / 2.967e14)


def test_many_at_once_are_bound_by_products_and_who_does_not_write_takes_no_time() -> None:
    many = cost(rollouts=10**4, slots=10**4, cache_bytes=0)
    assert many.generate_s == pytest.approx(2e9 * 10**5 / 2.967e14)
    assert cost(generates=False).generate_s == 0
