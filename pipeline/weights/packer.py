"""Puts a trainer's weights into versions: whole ones, or of a LoRA run the adapter alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onstream.pipeline.weights.adapter import BASE, LowRank, metadata_for, to_file
from onstream.pipeline.weights.file_format import Bytes
from onstream.pipeline.weights.policy import LoadedPolicy, WeightSum, serialised, unadapted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

State = Mapping[str, "Tensor | WeightSum"]


class PolicyPacker:
    """Packs the versions of one run.

    Args:
        dtype: of the weights that generators get.
        adapter_config: peft's configuration as JSON; None: versions are always whole.
    """

    def __init__(self, dtype: torch.dtype, adapter_config: str | None) -> None:
        self._dtype = dtype
        self._config = adapter_config
        self._base_digest = ""
        self._base: LoadedPolicy | None = None

    def pack(self, state: State, into: Bytes | None = None) -> Bytes:
        """[n], `state` as a safetensors file, in the memory `into` if that has the right size."""
        weights = self._adapted(state)
        if not weights:
            return serialised(state, self._dtype, into)
        assert self._config is not None
        base = self._base_digest or self.base(state).digest
        metadata = metadata_for(weights, base, self._dtype, self._config)
        return serialised(to_file(weights), None, into, metadata)

    def base(self, state: State) -> LoadedPolicy:
        """The full set that the adapters belong to: `state` without the adapter.

        Kept until `forget_base`.
        """
        if self._base is None:
            bases = {name: unadapted(weight) for name, weight in state.items()}
            self._base = LoadedPolicy(BASE, None, serialised(bases, self._dtype))
            self._base_digest = self._base.digest
        return self._base

    def forget_base(self) -> None:
        """Free the memory of the full set; its digest stays known."""
        self._base = None

    def size_bytes(self, state: State) -> int:
        """How large a version of `state` is, but for its head."""
        if weights := self._adapted(state):
            return sum(tensor.nbytes for tensor in to_file(weights).values())
        shapes = (unadapted(weight).shape for weight in state.values())
        return sum(math.prod(shape) for shape in shapes) * self._dtype.itemsize

    def _adapted(self, state: State) -> dict[str, LowRank]:
        """What the adapter adds, by the names of the weights; empty where versions are whole.

        They are where a sum is not that of an adapter's two factors and a weight of `dtype`: what
        is rounded to `dtype` before the sum is made would give others.
        """
        sums = {name: one for name, one in state.items() if isinstance(one, WeightSum)}
        found = {name: one.addition for name, one in sums.items()}
        low_rank = {name: one for name, one in found.items() if isinstance(one, LowRank)}
        rounded = any(one.base.dtype != self._dtype for one in sums.values())
        if self._config is None or rounded or len(low_rank) < len(sums):
            return {}
        return low_rank
