"""How far the trainer's logprobs are from the generator's, by staleness. Pure.

On tokens of the version that takes the step the two should agree up to the rounding of two
programs: what is left there is the engine's error. On older tokens the weights have moved as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor


class Mismatch(TypedDict):
    """Of |trainer − generator| over `tokens` tokens, in nats."""

    mean: float
    max: float
    tokens: int


class MismatchTally:
    """Counts, sums and maxima of the tokens of a step, by their staleness.

    They stay on the device until `result` reads them all at once.
    """

    def __init__(self) -> None:
        self._totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, mismatch: Tensor, staleness: Tensor, ages: Iterable[int]) -> None:
        """Add |trainer − generator| [n] of tokens with this `staleness` [n].

        Tokens with a staleness that is not in `ages` are left out.
        """
        for age in ages:
            of_age = staleness == age
            count = of_age.sum()
            total = torch.where(of_age, mismatch, 0).sum(dtype=torch.float64)
            largest = torch.where(of_age, mismatch, 0).max()
            if age in self._totals:
                counts, totals, maxima = self._totals[age]
                count = count + counts
                total = total + totals
                largest = torch.maximum(largest, maxima)
            self._totals[age] = count, total, largest

    def result(self) -> dict[int, Mismatch]:
        """The mismatch by staleness, lowest first; without those that no token has."""
        ages = sorted(self._totals)
        if not ages:
            return {}
        rows = [torch.stack([part.double() for part in self._totals[age]]) for age in ages]
        result = {}
        for age, (count, total, largest) in zip(ages, torch.stack(rows).tolist(), strict=True):
            if count:
                result[age] = Mismatch(mean=total / count, max=largest, tokens=int(count))
        return result


def mismatch_metrics(by_staleness: dict[int, Mismatch]) -> dict[str, object]:
    """The step's metrics by name: at staleness 0, and at each as `mismatch_by_staleness`.

    They are None where no policy wrote such tokens.
    """
    fresh = by_staleness.get(0)
    by_name = {str(age): mismatch for age, mismatch in by_staleness.items()}
    return {
        "mismatch_fresh_mean": fresh and fresh["mean"],
        "mismatch_fresh_max": fresh and fresh["max"],
        "mismatch_by_staleness": by_name or None,
    }
