"""What a transport stores: full sets of weights, and the deltas between versions."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import msgspec

from onstream.pipeline.weights.adapter import BASE
from onstream.pipeline.weights.file_format import Bytes
from onstream.pipeline.weights.policy import LoadedPolicy


class VersionId(NamedTuple):
    """A policy version. The number alone is not enough.

    A trainer that went back to a checkpoint may publish other weights under the same number.
    """

    number: int
    digest: str


class WeightPart(msgspec.Struct, frozen=True, array_like=True, tag="weights/1"):
    """Bytes stored at `place`: the whole version `number` or, with a `base`, a delta to that base.

    A delta to the version `BASE` is an adapter. `digest` is that of the version; "" for a file
    whose digest nobody noted, so that only reading it tells.
    """

    number: int
    digest: str
    size_bytes: int
    place: str
    base: VersionId | None = None

    @classmethod
    def of(cls, policy: LoadedPolicy, place: str) -> WeightPart:
        """The bytes of `policy`, all weights or an adapter, as a part."""
        note = policy.adapter
        base = VersionId(BASE, note.base) if note else None
        return cls(policy.number, policy.digest, policy.data.size, place, base)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, to be added to its base."""
        return self.base is not None and self.base.number == BASE

    def gives(self, version: VersionId) -> bool:
        """Whether reading this part gives `version`."""
        return self.number == version.number and self.digest in ("", version.digest)


class StoreReader(Protocol):
    """A generator's view of a transport."""

    @property
    def where(self) -> str:
        """The place, in words."""
        ...

    def parts(self) -> list[WeightPart]:
        """The parts that are complete; those still being written are not listed."""
        ...

    def read(self, part: WeightPart) -> Bytes:
        """The bytes of `part`, in memory that belongs to the caller.

        Raises:
            WeightsError: they are gone.
        """
        ...


class StoreWriter(StoreReader, Protocol):
    """The trainer's view of a transport."""

    def room_bytes(self) -> float:
        """How many more bytes may be stored beside the present parts."""
        ...

    def put_whole(self, policy: LoadedPolicy) -> WeightPart:
        """Store all of `policy`, weights or an adapter, and return it as a part.

        Where there is no room for it beside the present parts, it may replace them.

        Raises:
            UserError: there is no room for it.
            OSError: it cannot be written.
        """
        ...

    def put_delta(self, part: WeightPart, data: Bytes) -> WeightPart:
        """Store the delta `part`, and return it with its place.

        Raises:
            UserError: there is no room for it.
            OSError: it cannot be written.
        """
        ...

    def keep(self, parts: Collection[WeightPart]) -> None:
        """Offer `parts` to readers, and remove all others.

        A run directory may have other reasons to keep full sets.
        """
        ...


def chain_to(
    version: VersionId, parts: Collection[WeightPart], have: VersionId | None
) -> list[WeightPart] | None:
    """The parts to read for `version`, in order, with the fewest bytes in all.

    They are a full set and the deltas that follow it, or deltas that follow `have`, the version in
    memory. An empty list where `have` is `version`; None where no parts lead to it.
    """
    cheapest = None
    deltas = list[WeightPart]()
    current = version
    # Walks back from `version`, delta by delta. The range ends a loop in damaged data.
    for _ in range(len(parts) + 1):
        if current == have:
            return _cheaper(cheapest, deltas)
        sources = [part for part in parts if part.gives(current)]
        full = next((part for part in sources if part.base is None), None)
        if full is not None:
            cheapest = _cheaper(cheapest, [full, *deltas])
        delta = next((part for part in sources if part.base is not None), None)
        if delta is None or delta.base is None:
            return cheapest
        deltas = [delta, *deltas]
        current = delta.base
    return cheapest


def _cheaper(first: list[WeightPart] | None, second: list[WeightPart]) -> list[WeightPart]:
    if first is None:
        return second
    return min(second, first, key=lambda chain: sum(part.size_bytes for part in chain))


def useful_for(newest: int, parts: Collection[WeightPart]) -> list[WeightPart]:
    """The parts that lead to version `newest`.

    They are the newest full set up to it, the deltas after that set, and the delta that leads to
    the set itself. The last one is for generators that keep up; one that fell further behind starts
    from the full set.
    """
    fulls = [part.number for part in parts if part.base is None and part.number <= newest]
    start = max(fulls, default=0)
    return [part for part in parts if _is_useful(part, start, newest)]


def _is_useful(part: WeightPart, start: int, newest: int) -> bool:
    if part.base is None:
        return part.number == start
    return start <= part.number <= newest
