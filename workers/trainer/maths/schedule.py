"""The learning rate of a step. Pure, so that a resumed run, or one with another `max_steps`, needs
no scheduler state.
"""

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
    """The rate of `step`, counted from 1: a linear rise over `warmup` steps to `peak`, then flat or
    falling to `min_ratio` · peak.

    The last step, `max_steps`, has the lowest rate; later ones keep it.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    share = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (min_ratio + (1 - min_ratio) * share)
