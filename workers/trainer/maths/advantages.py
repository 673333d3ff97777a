"""How much better than its group a rollout did. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev


def group_advantages(rewards: Sequence[float | None], *, normalize: bool = False) -> list[float]:
    """Each reward less the group's mean reward, [G] -> [G]; 0 where there is no reward.

    A group of one, or of equal rewards, has advantages of 0. With `normalize` they are divided by
    the population standard deviation (GRPO, arXiv:2402.03300). Without it, groups whose rewards
    differ more weigh more (Dr. GRPO, arXiv:2503.20783).

    Example: [1, 0, None, 0.5] -> [0.5, -0.5, 0, 0].
    """
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2 or min(known) == max(known):
        return [0.0] * len(rewards)
    mean = fmean(known)
    scale = pstdev(known) if normalize else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
