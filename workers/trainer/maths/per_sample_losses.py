"""What each sample of a step came to, for a person who looks for the one that spoilt it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Witness:
    """Sees one step. Samples go by their place in it; what a sample has no token in the loss mask
    for, it does not have.

    `loss` is the sum over the sample's tokens, `mismatch_max` the largest |log ratio| of one of
    them, in nats (`rl` alone).
    """

    def __init__(self) -> None:
        self.loss: dict[int, float] = {}
        self.mismatch_max: dict[int, float] = {}
        self._tokens: dict[str, list[Tensor]] = {}

    def see(self, **values: Tensor) -> None:
        """Take per-token values of the packed row at hand, each [n]."""
        for name, value in values.items():
            self._tokens.setdefault(name, []).append(value.detach().float().cpu())

    def row(self, places: Sequence[int], counts: Sequence[int]) -> None:
        """The row at hand is complete: it held `counts` tokens of the samples at `places`, one
        sample after the other.
        """
        per_token = {
            name: torch.split(torch.cat(values), list(counts))
            for name, values in self._tokens.items()
        }
        self._tokens = {}
        for at, (place, count) in enumerate(zip(places, counts, strict=True)):
            if count:
                self.loss[place] = float(per_token["loss"][at].sum())
            if count and "mismatch" in per_token:
                self.mismatch_max[place] = float(per_token["mismatch"][at].max())
