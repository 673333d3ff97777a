"""Sums and maxima over the tokens of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StepMetrics:
    """Collects per-token values of a step, chunk by chunk.

    The sums stay on the device until `result` reads them all at once: a read per chunk would make
    the GPU wait.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add per-token values [n], to be averaged over the step."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def add_maxima(self, values: Mapping[str, Tensor]) -> None:
        """Keep the largest of per-token values [n]."""
        for name, value in values.items():
            largest = value.detach().max()
            if name in self._maxima:
                largest = torch.maximum(self._maxima[name], largest)
            self._maxima[name] = largest

    def result(self, tokens: int) -> dict[str, float]:
        """The sums divided by `tokens`, and the maxima, by name."""
        maxima = [largest.double() for largest in self._maxima.values()]
        values = torch.stack([*self._sums.values(), *maxima]).tolist()
        names = [*self._sums, *self._maxima]
        result = dict(zip(names, values, strict=True))
        for name in self._sums:
            result[name] /= tokens
        return result
