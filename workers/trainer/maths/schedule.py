"""The learning rate of a step. Pure: a run that is resumed needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    max_steps: int,
    schedule: Literal["constant", "linear", "cosine"],
    min_ratio: float,
) -> float:
    """The learning rate of `step`, counted from 1.

    It rises linearly over `warmup` steps to `peak`, then stays or falls to `min_ratio` · peak. Step
    `max_steps` has the lowest rate, and later ones keep it.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    share = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (min_ratio + (1 - min_ratio) * share)
