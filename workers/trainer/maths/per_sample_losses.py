"""The loss of each sample of a step, for a person who looks for the sample that spoilt it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
