"""How a generator gets a version: a full set, or deltas on the version that it has in memory,
whichever is fewer bytes.
"""

from __future__ import annotations

import numpy as np

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights.delta import applied
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError
from onstream.pipeline.weights.store import StoreReader, VersionId, chain_to


class PolicyFetcher:
    """Fetches versions from `shelf`. What it fetched last stays in memory where `deltas` are to be
    expected, or are there.

    `fetched_bytes` is what the last fetch read.
    """

    def __init__(self, shelf: StoreReader, *, deltas: bool) -> None:
        self._shelf = shelf
        self._deltas = deltas
        self._base: LoadedPolicy | None = None
        self.fetched_bytes = 0

    def fetch(self, policy: PolicyVersion) -> LoadedPolicy:
        """The weights of `policy`, read at once: what is checked is what is loaded, whatever
        becomes of the files.

        Raises:
            WeightsError: they are not there, or are not what was announced.
        """
        parts = self._shelf.parts()
        base = self._base
        have = VersionId(base.number, base.digest) if base else None
        way = chain_to(VersionId(policy.number, policy.digest), parts, have)
        if way is None:
            raise WeightsError(
                f"there are no weights of version {policy.number}, digest {policy.digest[:12]}, {self._shelf.where}"
            )
        if base is not None and not way:
            return base
        data = [self._shelf.read(part) for part in way]
        self.fetched_bytes = sum(one.size for one in data)
        start = data.pop(0) if way[0].base is None or base is None else np.copy(base.data)
        loaded = applied(policy.number, policy.digest, start, data)
        self._base = loaded if self._deltas or any(part.base for part in parts) else None
        return loaded
