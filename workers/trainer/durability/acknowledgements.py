"""What the trainer owes: which entries it holds, which numbers are settled, and which entries may
be acknowledged.

An entry is acknowledged only when the checkpoint *after* the one that records its fate is durable.
So the trainer can fall back by one checkpoint and still find, pending, all that the lost one had
settled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from onstream.pipeline.run_files.ledger import Fate, RangeSet, Settled
from onstream.pipeline.stage import Delivery
from onstream.workers.trainer.durability.checkpoint import TrainerState

DEAD: tuple[Fate, ...] = ("dead", "group_dead")


class Held(NamedTuple):
    """What an entry that the trainer holds is of, and what it takes in Redis."""

    number: int
    payload_bytes: int


Entries = dict[bytes, Held]  # by entry id


class Acknowledgements:
    """The books of one trainer, opened from the checkpoint it resumes from (None at the start of a
    run).
    """

    def __init__(self, state: TrainerState | None) -> None:
        self.fates: dict[Fate, RangeSet] = (
            {fate: RangeSet(ranges) for fate, ranges in state.settled.items()} if state else {}
        )
        self.settled = RangeSet()
        for numbers in self.fates.values():
            self.settled.update(numbers)
        self._in_newest = self.settled.copy()
        self._in_older = RangeSet(state.before if state else ())
        self._open: dict[int, Entries] = {}  # not settled, by number
        self._since: Entries = {}  # settled after the newest checkpoint
        self._held: Entries = {}  # settled in the newest checkpoint
        self._payable: Entries = {}  # settled in an older one: may be acknowledged
        self.lines: list[Settled] = []  # of the ledger, settled after the newest checkpoint

    def take(self, delivery: Delivery) -> bool:
        """Book an entry read from the stream; False when its number is settled or in hand already,
        so it must not count again.
        """
        first = delivery.number not in self.settled and delivery.number not in self._open
        self._place(delivery.number)[delivery.entry_id] = Held(
            delivery.number, delivery.payload_bytes
        )
        return first

    def take_without_entry(self, number: int) -> None:
        """Book a number whose entry is gone for good; one that comes after all does not count
        again.
        """
        self._open.setdefault(number, {})

    def known(self) -> RangeSet:
        """Every number that has settled, or is in hand for it."""
        known = self.settled.copy()
        for number in self._open:
            known.add(number)
        return known

    def beyond_recall(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that no trainer will look at again, even one that falls back by a
        checkpoint.
        """
        return [number for number in numbers if number in self._in_older]

    def settle(self, numbers: Iterable[int], fate: Fate, step: int) -> None:
        """Fix the fate of `numbers` in `step`."""
        for number in numbers:
            self.fates.setdefault(fate, RangeSet()).add(number)
            self.settled.add(number)
            self._since.update(self._open.pop(number, {}))
            self.lines.append(Settled(number, fate, step))

    def purge(self, number: int, step: int) -> None:
        """Count a dead number as purged from `step` on: an operator took its dead letter away."""
        for fate in DEAD:
            self.fates.get(fate, RangeSet()).discard(number)
        self.fates.setdefault("purged", RangeSet()).add(number)
        self.lines.append(Settled(number, "purged", step))

    def is_dead(self, number: int) -> bool:
        """Whether `number` is settled as dead."""
        return any(number in self.fates.get(fate, ()) for fate in DEAD)

    def durable(self) -> None:
        """A checkpoint of everything settled so far is durable; what the one before it held may be
        acknowledged.
        """
        self._payable.update(self._held)
        self._held = self._since
        self._since = {}
        self.lines = []
        self._in_older, self._in_newest = self._in_newest, self.settled.copy()

    def payable(self) -> dict[bytes, int]:
        """The entries to acknowledge now, numbers by entry id. They stay payable until `paid`,
        should Redis be away.
        """
        return {entry_id: held.number for entry_id, held in self._payable.items()}

    def paid(self, ids: Iterable[bytes]) -> None:
        """`ids` are acknowledged."""
        for entry_id in ids:
            self._payable.pop(entry_id, None)

    def all_lines(self, step: int) -> list[Settled]:
        """A ledger of every settled number; all as of `step`, since the ranges do not say in which
        they settled.
        """
        return [
            Settled(number, fate, step)
            for fate, numbers in self.fates.items()
            for number in numbers
        ]

    @property
    def before(self) -> list[tuple[int, int]]:
        """What the newest checkpoint holds, as ranges; the next one names it as what the checkpoint
        before it held.
        """
        return self._in_newest.ranges()

    @property
    def since_bytes(self) -> int:
        """Payload of the entries settled after the newest checkpoint."""
        return _bytes_of(self._since)

    @property
    def unacked_bytes(self) -> int:
        """Payload of all settled entries that Redis still keeps for us."""
        return self.since_bytes + _bytes_of(self._held) + _bytes_of(self._payable)

    def _place(self, number: int) -> Entries:
        if number not in self.settled:
            return self._open.setdefault(number, {})
        if number in self._in_older:
            return self._payable
        return self._held if number in self._in_newest else self._since


def _bytes_of(entries: Entries) -> int:
    return sum(held.payload_bytes for held in entries.values())
