"""What is collected over the tokens of a step: sums, maxima, mismatch, and losses by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

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


class Mismatch(TypedDict):
    """Of |trainer − generator| over `tokens` tokens, in nats."""

    mean: float
    max: float
    tokens: int


class MismatchTally:
    """How far the trainer's logprobs are from the generator's in a step, by staleness.

    On tokens of the version that takes the step the two should agree up to the rounding of two
    programs: what is left there is the engine's error. On older tokens the weights have moved too.

    Counts, sums and maxima stay on the device until `result` reads them all at once.
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


class PerSampleLosses:
    """Collects what each sample of one step came to, by the sample's place in the step.

    `loss` is the sum over the sample's loss-mask tokens. `mismatch_max` is the largest
    |trainer − generator| of one of them, in nats, where the loss reads the generator's logprobs. A
    sample without a token in its loss mask is in neither.
    """

    def __init__(self) -> None:
        self.loss: dict[int, float] = {}
        self.mismatch_max: dict[int, float] = {}
        self._tokens: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        """Take per-token values of the packed row at hand, each [n]."""
        for name, value in values.items():
            self._tokens.setdefault(name, []).append(value.detach().float().cpu())

    def end_row(self, places: Sequence[int], counts: Sequence[int]) -> None:
        """Split the values of a whole row among its samples.

        The row held `counts` tokens of the samples at `places`, one sample after the other.
        """
        per_token = {}
        for name, values in self._tokens.items():
            per_token[name] = torch.split(torch.cat(values), list(counts))
        self._tokens = {}
        for at, (place, count) in enumerate(zip(places, counts, strict=True)):
            if not count:
                continue
            self.loss[place] = float(per_token["loss"][at].sum())
            if "mismatch" in per_token:
                self.mismatch_max[place] = float(per_token["mismatch"][at].max())
