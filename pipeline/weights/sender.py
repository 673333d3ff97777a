"""How the trainer gives a version to the generators: whole, or as what changed."""

from __future__ import annotations

from dataclasses import dataclass

from onstream.pipeline.weights.delta import Delta, encode
from onstream.pipeline.weights.policy import LoadedPolicy
from onstream.pipeline.weights.store import (
    StoredWeights,
    StoreWriter,
    VersionId,
    chain_to,
    useful_for,
)


@dataclass(frozen=True)
class SendResult:
    """`update_bytes` is what a generator that keeps up reads; `changed_share` of the weights
    changed, None where nobody compared.
    """

    update_bytes: int
    changed_share: float | None


class PolicySender:
    """Puts versions into `outlet`. With `full_every` they go as deltas wherever those are smaller.

    A full set goes out for versions that divide by `full_every`, where the deltas since the last
    one have come to its size, and wherever readers could not get at the version that the delta
    would be laid over.
    """

    def __init__(self, outlet: StoreWriter, full_every: int | None) -> None:
        self._outlet = outlet
        self._full_every = full_every
        self._base: LoadedPolicy | None = None

    def send(self, policy: LoadedPolicy, *, whole: bool = False) -> SendResult:
        """Offer `policy`, the newest version from now on; `whole` asks for a full set in any case.
        What became useless goes.

        Raises:
            UserError: there is no room for it.
            OSError: it cannot be written.
        """
        parts = [part for part in self._outlet.parts() if part.number < policy.number]
        delta = self._delta(policy)
        part = self._delta_part(policy, delta, parts)
        new = list[StoredWeights]()
        if whole or part is None or self._due(policy, [*parts, part]):
            new.append(
                self._outlet.put(
                    StoredWeights(policy.number, policy.digest, policy.data.size, ""), policy.data
                )
            )
        if part and delta and delta.data is not None:
            new.append(self._outlet.put(part, delta.data))
        self._outlet.keep(useful_for([*parts, *new], policy.number))
        self._base = policy if self._full_every else None
        return SendResult(
            part.size_bytes if part else policy.data.size, delta.share if delta else None
        )

    def skip(self, policy: LoadedPolicy) -> SendResult:
        """`policy` is there already: the next delta may be laid over it."""
        delta = self._delta(policy)
        self._base = policy if self._full_every else None
        return SendResult(0, delta.share if delta else None)

    def offers(self, version: VersionId) -> bool:
        """Whether a generator that has nothing can get `version`."""
        return _reachable(version, self._outlet.parts())

    def _delta(self, policy: LoadedPolicy) -> Delta | None:
        return encode(self._base, policy) if self._base else None

    def _delta_part(
        self, policy: LoadedPolicy, delta: Delta | None, parts: list[StoredWeights]
    ) -> StoredWeights | None:
        """The delta as a part, where it is of use to readers and has room."""
        if self._base is None or delta is None or delta.data is None:
            return None
        base = VersionId(self._base.number, self._base.digest)
        if not _reachable(base, parts) or delta.data.size > self._outlet.room_bytes():
            return None
        return StoredWeights(policy.number, policy.digest, delta.data.size, "", base)

    def _due(self, policy: LoadedPolicy, parts: list[StoredWeights]) -> bool:
        if not self._full_every or policy.number % self._full_every == 0:
            return True
        return (
            sum(part.size_bytes for part in useful_for(parts, policy.number) if part.base)
            >= policy.data.size
        )


def _reachable(version: VersionId, parts: list[StoredWeights]) -> bool:
    return chain_to(version, parts, None) is not None
