"""Rewards against the mean of their group."""

from __future__ import annotations

import pytest

from onstream.workers.trainer.maths.scalars import group_advantages


def test_an_advantage_is_the_reward_less_the_groups_mean() -> None:
    assert group_advantages([1.0, 0.0, 0.5, 0.5]) == [0.5, -0.5, 0.0, 0.0]


def test_a_missing_reward_has_no_advantage_and_no_part_in_the_mean() -> None:
    assert group_advantages([1.0, 0.0, None, 0.5]) == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("rewards", [[], [3.0], [None, 3.0], [None, None], [0.1, 0.1, 0.1]])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_reward_or_equal_rewards_have_no_advantage(
    rewards: list[float | None], normalize: bool
) -> None:
    assert group_advantages(rewards, normalize=normalize) == [0.0] * len(rewards)


def test_normalized_advantages_are_divided_by_the_standard_deviation() -> None:
    assert group_advantages([1.0, 3.0], normalize=True) == [-1.0, 1.0]
    assert group_advantages([10.0, 30.0, None], normalize=True) == [-1.0, 1.0, 0.0]
