"""What a transport holds: full sets of weights and the deltas between versions, and which of them
make a version.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import msgspec

from onstream.pipeline.weights.policy import Bytes


class VersionId(NamedTuple):
    """A policy version. A number alone names none: a trainer that went back may publish other
    weights under it.
    """

    number: int
    digest: str


class StoredWeights(msgspec.Struct, frozen=True, array_like=True, tag="weights/1"):
    """Bytes that lie ready at `place`: version `number` whole or, with a `base`, as a delta to be
    laid over that.

    `digest` is that of the version's safetensors file; "" for a whole file whose digest nobody
    noted, to be found by reading it.
    """

    number: int
    digest: str
    size_bytes: int
    place: str
    base: VersionId | None = None

    def makes(self, version: VersionId) -> bool:
        """Whether `version` comes of it."""
        return self.number == version.number and self.digest in ("", version.digest)


class StoreReader(Protocol):
    """A generator's view of a transport."""

    @property
    def where(self) -> str:
        """The place, in words."""
        ...

    def parts(self) -> list[StoredWeights]:
        """What is there, whole: parts that are being written are not."""
        ...

    def read(self, part: StoredWeights) -> Bytes:
        """The bytes of `part`, in memory that is the caller's.

        Raises:
            WeightsError: they are gone.
        """
        ...


class StoreWriter(StoreReader, Protocol):
    """The trainer's view of a transport."""

    def room_bytes(self) -> float:
        """How much more may be put beside what is there."""
        ...

    def put(self, part: StoredWeights, data: Bytes) -> StoredWeights:
        """Store `part`, and return it with the place that it got. A full set without room beside
        what is there may take its place.

        Raises:
            UserError: there is no room for it.
            OSError: it cannot be written.
        """
        ...

    def keep(self, parts: Collection[StoredWeights]) -> None:
        """Offer `parts` to readers, and remove what is not among them. (A run directory may have
        reasons to keep full sets.)
        """
        ...


def chain_to(
    version: VersionId, parts: Collection[StoredWeights], have: VersionId | None
) -> list[StoredWeights] | None:
    """What to read for `version`, in order: the fewest bytes of a full set and deltas that follow,
    or deltas on what one has.

    An empty list where `have` is it; None where nothing that is there leads to it.
    """
    deltas = list[StoredWeights]()
    found = None
    at = version
    for _ in range(len(parts) + 1):
        if at == have:
            return _cheaper(found, deltas)
        if full := next((part for part in parts if part.base is None and part.makes(at)), None):
            found = _cheaper(found, [full, *deltas])
        delta = next((part for part in parts if part.base is not None and part.makes(at)), None)
        if delta is None or delta.base is None:
            return found
        deltas = [delta, *deltas]
        at = delta.base
    return found


def _cheaper(first: list[StoredWeights] | None, second: list[StoredWeights]) -> list[StoredWeights]:
    if first is None:
        return second
    return min(second, first, key=lambda way: sum(part.size_bytes for part in way))


def useful_for(parts: Collection[StoredWeights], newest: int) -> list[StoredWeights]:
    """The parts that lead to version `newest`: the newest full set up to it, the deltas since, and
    the one to that version itself.

    That one is for those who keep up; whoever fell further behind starts from the full set.
    """
    fulls = [part.number for part in parts if part.base is None and part.number <= newest]
    start = max(fulls, default=0)
    return [
        part
        for part in parts
        if (part.number == start if part.base is None else start <= part.number <= newest)
    ]
