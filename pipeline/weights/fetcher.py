"""How a generator gets a version: a full set, or what is added to the one in memory."""

from __future__ import annotations

import numpy as np

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights.adapter import BASE
from onstream.pipeline.weights.delta import apply_deltas
from onstream.pipeline.weights.file_format import Bytes
from onstream.pipeline.weights.merging import merged
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError
from onstream.pipeline.weights.store import StoreReader, VersionId, WeightPart, chain_to


class PolicyFetcher:
    """Fetches versions from `store`, by whichever parts are fewer bytes.

    The last version stays in memory where `deltas` are expected, or are there; of versions that are
    adapters, the full set that they belong to does. `fetched_bytes` is what the last fetch read.
    """

    def __init__(self, store: StoreReader, *, deltas: bool) -> None:
        self._store = store
        self._deltas = deltas
        self._base: LoadedPolicy | None = None
        self.fetched_bytes = 0

    def fetch(self, policy: PolicyVersion) -> LoadedPolicy:
        """All weights of `policy`, in memory: what is checked is what is loaded.

        An adapter is merged. The digest of the result is then its own, not the version's.
        Files and chunks may be replaced or removed at any time; nothing is read again.

        Raises:
            WeightsError: they are not there, or are not what was announced.
        """
        parts = self._store.parts()
        base = self._base
        have = None
        if base is not None:
            have = VersionId(base.number, base.digest)
        chain = chain_to(VersionId(policy.number, policy.digest), parts, have)
        if chain is None:
            raise WeightsError(
                f"there are no weights of version {policy.number}, "
                f"digest {policy.digest[:12]}, {self._store.where}"
            )
        if base is not None and not chain:
            return base
        data = [self._store.read(part) for part in chain]
        self.fetched_bytes = sum(part.size for part in data)
        if chain[-1].is_adapter:
            return self._with_adapter(policy, chain, data)
        loaded = self._with_deltas(policy, chain, data)
        keep = self._deltas or any(part.base for part in parts)
        self._base = loaded if keep else None
        return loaded

    def _with_adapter(
        self, policy: PolicyVersion, chain: list[WeightPart], data: list[Bytes]
    ) -> LoadedPolicy:
        """The base, read now or before, with the adapter that was read last."""
        adapter = LoadedPolicy(policy.number, policy.digest, data[-1])
        if len(chain) > 1:
            self._base = LoadedPolicy(BASE, chain[0].digest, data[0])
        assert self._base is not None, "or the chain would begin with it"
        return merged(self._base, adapter)

    def _with_deltas(
        self, policy: PolicyVersion, chain: list[WeightPart], data: list[Bytes]
    ) -> LoadedPolicy:
        if chain[0].base is None or self._base is None:
            start = data.pop(0)
        else:
            start = np.copy(self._base.data)  # deltas overwrite; an engine may still hold the base
        return apply_deltas(policy.number, policy.digest, start, data)
