"""How far the trainer's logprobs are from the generator's, by how old the policy was that wrote the
token. Pure.

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
    """Counts, sums and maxima of the tokens of a step, by their staleness. They stay on the device
    until `found` reads them.
    """

    def __init__(self) -> None:
        self._totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, mismatch: Tensor, staleness: Tensor, ages: Iterable[int]) -> None:
        """Adds |trainer − generator| [n] of tokens with this `staleness` [n]; those with another
        one than `ages` are left out.
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

    def found(self) -> dict[int, Mismatch]:
        """What was added, by staleness in rising order; a staleness that no token has is left out."""
        ages = sorted(self._totals)
        if not ages:
            return {}
        read = torch.stack(
            [torch.stack([part.double() for part in self._totals[age]]) for age in ages]
        ).tolist()
        return {
            age: Mismatch(mean=total / count, max=largest, tokens=int(count))
            for age, (count, total, largest) in zip(ages, read, strict=True)
            if count
        }


def mismatch_metrics(found: dict[int, Mismatch]) -> dict[str, object]:
    """The step's metrics by name: those at staleness 0 on their own, and all of them under
    `mismatch_by_staleness`.
    """
    fresh = found.get(0)
    return {
        "mismatch_fresh_mean": fresh and fresh["mean"],
        "mismatch_fresh_max": fresh and fresh["max"],
        "mismatch_by_staleness": {str(age): mismatch for age, mismatch in found.items()} or None,
    }
