"""How the trainer gives a version to the generators: whole, as what changed, or as an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onstream.pipeline.weights.adapter import BASE
from onstream.pipeline.weights.delta import Delta, encode
from onstream.pipeline.weights.policy import LoadedPolicy
from onstream.pipeline.weights.store import (
    StoreWriter,
    VersionId,
    WeightPart,
    chain_to,
    useful_for,
)


@dataclass(frozen=True)
class SendResult:
    """What sending a version came to.

    `update_bytes` is what a generator that keeps up reads. `changed_share` of the weights changed;
    None where they were not compared.
    """

    update_bytes: int
    changed_share: float | None


class PolicySender:
    """Puts versions into `store`. With `full_every` they go as deltas where those are smaller.

    A full set goes out for versions that `full_every` divides, where the deltas since the last full
    set have come to its size, and where readers cannot get the base of the delta. `base` is the
    version that the next delta starts from, where there will be one. A version that is an adapter
    goes as it is, beside the full set that it belongs to.
    """

    def __init__(self, store: StoreWriter, full_every: int | None) -> None:
        self._store = store
        self._full_every = full_every
        self.base: LoadedPolicy | None = None

    def send(
        self,
        policy: LoadedPolicy,
        *,
        whole: bool = False,
        adapter_base: Callable[[], LoadedPolicy] | None = None,
    ) -> SendResult:
        """Offer `policy` as the newest version, and remove the parts that lead to it no more.

        `whole` asks for a full set instead of a delta. `adapter_base` gives the full set that an
        adapter belongs to; it is asked where the store lacks that.

        Raises:
            UserError: there is no room for it.
            OSError: it cannot be written.
        """
        if policy.adapter is not None:
            assert adapter_base is not None, "an adapter belongs to a full set"
            return self._send_adapter(policy, policy.adapter.base, adapter_base)
        # After a fall-back to a checkpoint there may be parts of later numbers: they go.
        parts = [part for part in self._store.parts() if part.number < policy.number]
        delta = self._delta(policy)
        delta_part = self._delta_part(policy, delta, parts)
        written = list[WeightPart]()
        if whole or delta_part is None or self._full_set_due(policy, [*parts, delta_part]):
            written.append(self._store.put_whole(policy))
        if delta_part and delta and delta.data is not None:
            written.append(self._store.put_delta(delta_part, delta.data))
        # Readers see the new parts only now, when all are complete.
        self._store.keep(useful_for(policy.number, [*parts, *written]))
        self._remember(policy)
        update_bytes = delta_part.size_bytes if delta_part else policy.data.size
        return SendResult(update_bytes, delta.share if delta else None)

    def _send_adapter(
        self, policy: LoadedPolicy, base_digest: str, adapter_base: Callable[[], LoadedPolicy]
    ) -> SendResult:
        wanted = VersionId(BASE, base_digest)
        found = [part for part in self._store.parts() if part.gives(wanted)]
        base = found[0] if found else self._store.put_whole(adapter_base())
        if policy.data.size > self._store.room_bytes():
            self._store.keep([base])
        self._store.keep([base, self._store.put_whole(policy)])
        self.base = None
        return SendResult(policy.data.size, None)

    def skip(self, policy: LoadedPolicy) -> SendResult:
        """Take `policy`, which is there already, as the base of the next delta."""
        delta = self._delta(policy)
        self._remember(policy)
        return SendResult(0, delta.share if delta else None)

    def offers(self, version: VersionId) -> bool:
        """Whether a generator that has no weights can get `version`."""
        return _reachable(version, self._store.parts())

    def _remember(self, policy: LoadedPolicy) -> None:
        self.base = policy if self._full_every and policy.adapter is None else None

    def _delta(self, policy: LoadedPolicy) -> Delta | None:
        return encode(self.base, policy) if self.base else None

    def _delta_part(
        self, policy: LoadedPolicy, delta: Delta | None, parts: list[WeightPart]
    ) -> WeightPart | None:
        """The delta as a part; None where readers cannot use it, or it has no room."""
        if self.base is None or delta is None or delta.data is None:
            return None
        base = VersionId(self.base.number, self.base.digest)
        size = delta.data.size
        if not _reachable(base, parts) or size > self._store.room_bytes():
            return None
        return WeightPart(policy.number, policy.digest, size, place="", base=base)

    def _full_set_due(self, policy: LoadedPolicy, parts: list[WeightPart]) -> bool:
        if not self._full_every or policy.number % self._full_every == 0:
            return True
        deltas = [part.size_bytes for part in useful_for(policy.number, parts) if part.base]
        return sum(deltas) >= policy.data.size


def _reachable(version: VersionId, parts: list[WeightPart]) -> bool:
    return chain_to(version, parts, None) is not None
