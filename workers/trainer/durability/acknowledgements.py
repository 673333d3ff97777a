"""Which numbers have settled, and which entries the trainer may acknowledge.

A settled entry is acknowledged once its record is durable in the run's journal: a trainer that
resumes, even one checkpoint further back, takes it again from there.

The journal has no images, and Redis lets go of them with their entries. So an entry that names
images is acknowledged only when the checkpoint *after* the one that records its fate is durable,
and so is one whose record is in no journal. Then the trainer can fall back by one checkpoint and
still find, pending, all that the lost one had settled.

    open          the number has not settled
    unsaved       settled after the newest checkpoint N, and the one that is being written
    writing       settled in the checkpoint that is being written, if there is one
    saved         settled in checkpoint N, and in no older one
    releasable    durable in the journal, or settled in checkpoint N-1 or before

Numbers settle nearly in order, so they are kept as ranges: a million take a few dozen pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from onstream.pipeline.records import Rollout
from onstream.pipeline.run_files.ledger import Fate, Settled
from onstream.pipeline.stage import Delivery
from onstream.workers.trainer.durability.checkpoint import TrainerState

DEAD: tuple[Fate, ...] = ("dead", "group_dead")


class RangeSet:
    """A set of positive whole numbers, kept as sorted, disjoint, non-adjacent inclusive ranges."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._first: list[int] = []
        self._last: list[int] = []
        for first, last in ranges:
            self.add(first, last)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> RangeSet:
        """The set of `numbers`, in any order."""
        result = cls()
        for number in numbers:
            result.add(number)
        return result

    def add(self, first: int, last: int | None = None) -> None:
        """Put in the numbers `first` … `last`; without `last`, one number."""
        last = first if last is None else last
        low = bisect_right(self._last, first - 2)  # the first range that touches or follows
        high = bisect_right(self._first, last + 1)  # past the last range that touches
        if low < high:
            first = min(first, self._first[low])
            last = max(last, self._last[high - 1])
        self._first[low:high] = [first]
        self._last[low:high] = [last]

    def discard(self, number: int) -> None:
        """Take out `number`, if it is there."""
        at = bisect_right(self._first, number) - 1
        if number not in self:
            return
        first = self._first[at]
        last = self._last[at]
        rest = [
            (low, high) for low, high in ((first, number - 1), (number + 1, last)) if low <= high
        ]
        self._first[at : at + 1] = [low for low, _ in rest]
        self._last[at : at + 1] = [high for _, high in rest]

    def update(self, other: RangeSet) -> None:
        """Put in every number of `other`."""
        for first, last in other.ranges():
            self.add(first, last)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._first, number) - 1
        return at >= 0 and number <= self._last[at]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges())

    def __iter__(self) -> Iterator[int]:
        for first, last in self.ranges():
            yield from range(first, last + 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self.ranges() == other.ranges()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def ranges(self) -> list[tuple[int, int]]:
        """The ranges as (first, last), both included, ascending; `RangeSet(…)` takes them."""
        return list(zip(self._first, self._last, strict=True))

    def copy(self) -> RangeSet:
        """An equal set of its own."""
        return RangeSet(self.ranges())

    def missing(self, upto: int) -> Iterator[int]:
        """The numbers of 1 … `upto` that are not in the set, ascending."""
        expected = 1
        for first, last in self.ranges():
            yield from range(expected, min(first, upto + 1))
            expected = last + 1
        yield from range(expected, upto + 1)


class SettledNumbers:
    """Every settled number, by its fate; `ranges` are those of a checkpoint, none at the start."""

    def __init__(self, ranges: Mapping[Fate, Iterable[Sequence[int]]] | None = None) -> None:
        self._by_fate: dict[Fate, RangeSet] = {}
        self._all = RangeSet()
        for fate, numbers in (ranges or {}).items():
            self._by_fate[fate] = RangeSet(numbers)
            self._all.update(self._by_fate[fate])

    def add(self, settled: Iterable[Settled]) -> None:
        """Put in what has settled now."""
        for line in settled:
            self._by_fate.setdefault(line.fate, RangeSet()).add(line.number)
            self._all.add(line.number)

    def purge(self, number: int) -> None:
        """Count a dead number as purged."""
        for fate in DEAD:
            self._by_fate.get(fate, RangeSet()).discard(number)
        self._by_fate.setdefault("purged", RangeSet()).add(number)

    def is_dead(self, number: int) -> bool:
        """Whether `number` is settled as dead."""
        return any(number in self._by_fate.get(fate, ()) for fate in DEAD)

    def numbers(self) -> RangeSet:
        """All of them, in a set of its own."""
        return self._all.copy()

    def ranges(self) -> dict[Fate, list[tuple[int, int]]]:
        """All of them as ranges by fate, as a checkpoint holds them."""
        return {fate: numbers.ranges() for fate, numbers in self._by_fate.items()}

    def lines(self, step: int) -> Iterator[Settled]:
        """A ledger of all of them; as of `step`, since the ranges do not say when they settled."""
        for fate, numbers in self._by_fate.items():
            for number in numbers:
                yield Settled(number, fate, step)

    def __contains__(self, number: int) -> bool:
        return number in self._all

    def __len__(self) -> int:
        return len(self._all)


class PendingEntry(NamedTuple):
    """An entry that Redis keeps for the trainer: whose it is, and what it takes."""

    number: int
    payload_bytes: int
    has_images: bool


class EntryGroup:
    """Entries by their ids, with the payload of all of them and of those that name images."""

    def __init__(self) -> None:
        self._entries: dict[bytes, PendingEntry] = {}
        self.payload_bytes = 0
        self.image_entry_bytes = 0

    def put(self, entry_id: bytes, entry: PendingEntry) -> None:
        """Put in an entry; in the place of one with its id."""
        self.take_out(entry_id)
        self._entries[entry_id] = entry
        self._count(entry, 1)

    def take_out(self, entry_id: bytes) -> PendingEntry | None:
        """Take out an entry; None where it is not here."""
        entry = self._entries.pop(entry_id, None)
        if entry is not None:
            self._count(entry, -1)
        return entry

    def take_in(self, other: EntryGroup) -> None:
        """Put in all entries of `other`, which has none then."""
        for entry_id, entry in other.items():
            self.put(entry_id, entry)
        other.clear()

    def clear(self) -> None:
        """Take out all of them."""
        self._entries = {}
        self.payload_bytes = 0
        self.image_entry_bytes = 0

    def items(self) -> Iterable[tuple[bytes, PendingEntry]]:
        """Each entry with its id."""
        return self._entries.items()

    def _count(self, entry: PendingEntry, sign: int) -> None:
        self.payload_bytes += sign * entry.payload_bytes
        if entry.has_images:
            self.image_entry_bytes += sign * entry.payload_bytes


class Acknowledgements:
    """The entries of one trainer, from the checkpoint it resumes from (None: the run's start).

    A checkpoint is `checkpoint_begins`, then `checkpoint_is_durable` or `checkpoint_failed`. What
    settles in between is for the next one.
    """

    def __init__(self, state: TrainerState | None) -> None:
        self.settled = SettledNumbers(state.settled if state else None)
        self._in_older = RangeSet(state.before if state else ())
        self._in_newest = self.settled.numbers()
        self._in_written = RangeSet()
        self._open: dict[int, dict[bytes, PendingEntry]] = {}  # by number
        self._unsaved = EntryGroup()
        self._writing = EntryGroup()
        self._saved = EntryGroup()
        self._releasable = EntryGroup()
        self._awaits_journal: dict[int, list[bytes]] = {}  # settled entries, by number
        self.unsaved_lines: list[Settled] = []  # of the ledger
        self._written_lines: list[Settled] = []
        self._journalled: deque[tuple[int, int]] = deque()  # numbers, by the end of their frames
        self._durable = RangeSet()  # numbers whose records are durable in the journal

    def take(self, delivery: Delivery) -> bool:
        """Book an entry read from the stream.

        Returns False when its number has settled or is in hand already: it must not count again.
        """
        number = delivery.number
        first = number not in self.settled and number not in self._open
        record = delivery.record
        has_images = isinstance(record, Rollout) and any(one.images for one in record.samples)
        entry = PendingEntry(number, delivery.payload_bytes, has_images)
        if number in self.settled:
            self._put_settled(delivery.entry_id, entry)
        else:
            self._open.setdefault(number, {})[delivery.entry_id] = entry
        return first

    def open_entries(self, number: int) -> list[bytes]:
        """The entries of `number`, which has not settled."""
        return list(self._open.get(number, ()))

    def take_without_entry(self, number: int) -> None:
        """Book a number whose entry is gone for good.

        An entry of it that comes after all does not count again.
        """
        self._open.setdefault(number, {})

    def take_from_journal(self, numbers: Iterable[int]) -> None:
        """Book numbers whose records a trainer before this one made durable in the journal."""
        for number in numbers:
            self.take_without_entry(number)
            self._durable.add(number)

    def journalled(self, written: Iterable[tuple[int, int]]) -> None:
        """Note numbers whose records are in the journal now, each with the position behind it."""
        self._journalled.extend(written)

    def journal_is_durable(self, position: int) -> None:
        """The journal is durable up to `position`: settled entries there may be acknowledged."""
        while self._journalled and self._journalled[0][1] <= position:
            number, _ = self._journalled.popleft()
            self._durable.add(number)
            for entry_id in self._awaits_journal.pop(number, ()):
                self._release(entry_id)

    def known(self) -> RangeSet:
        """Every number that has settled or is in hand."""
        known = self.settled.numbers()
        for number in self._open:
            known.add(number)
        return known

    def settled_for_good(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that no trainer looks at again, even one checkpoint further back."""
        return [number for number in numbers if number in self._in_older]

    def settle(self, settled: Iterable[Settled]) -> None:
        """Fix the fates of numbers. Their entries go when the journal is durable."""
        lines = list(settled)
        self.settled.add(lines)
        for line in lines:
            for entry_id, entry in self._open.pop(line.number, {}).items():
                self._put_settled(entry_id, entry)
        self.unsaved_lines += lines

    def purge(self, number: int, step: int) -> None:
        """Count a dead number as purged from `step` on: an operator removed its dead letter."""
        self.settled.purge(number)
        self.unsaved_lines.append(Settled(number, "purged", step))

    def checkpoint_begins(self) -> list[Settled]:
        """A checkpoint of everything settled so far is about to be written.

        Returns the lines that it adds to the ledger.
        """
        self._writing.take_in(self._unsaved)
        self._in_written = self.settled.numbers()
        self._written_lines = self.unsaved_lines
        self.unsaved_lines = []
        return self._written_lines

    def checkpoint_failed(self) -> None:
        """The checkpoint was not written: what it would have held waits for another one."""
        self._unsaved.take_in(self._writing)
        self._in_written = RangeSet()
        self.unsaved_lines = self._written_lines + self.unsaved_lines
        self._written_lines = []

    def checkpoint_is_durable(self) -> None:
        """The checkpoint is written.

        What the checkpoint before it held may be acknowledged. What this one is the first to hold
        may not: if it is torn, the trainer resumes from the one before and needs those entries.
        """
        for _, entry in self._saved.items():
            self._awaits_journal.pop(entry.number, None)
        self._releasable.take_in(self._saved)
        self._saved.take_in(self._writing)
        self._in_older = self._in_newest
        self._in_newest = self._in_written
        self._in_written = RangeSet()
        self._written_lines = []

    def releasable(self) -> dict[bytes, int]:
        """The entries to acknowledge now, numbers by entry id; until `released`."""
        return {entry_id: entry.number for entry_id, entry in self._releasable.items()}

    def released(self, entry_ids: Iterable[bytes]) -> None:
        """Forget entries that Redis has acknowledged."""
        for entry_id in entry_ids:
            self._releasable.take_out(entry_id)

    @property
    def in_newest_checkpoint(self) -> list[tuple[int, int]]:
        """The numbers that the newest checkpoint holds, as ranges; `before` in the next one."""
        return self._in_newest.ranges()

    @property
    def unsaved_bytes(self) -> int:
        """Payload of the entries that wait for a checkpoint that is not begun yet."""
        return self._unsaved.image_entry_bytes

    @property
    def waiting_bytes(self) -> int:
        """Payload of the settled entries that wait for a checkpoint."""
        return sum(group.image_entry_bytes for group in self._in_checkpoints)

    @property
    def unacked_bytes(self) -> int:
        """Payload of all settled entries that Redis still keeps for the trainer."""
        return sum(group.payload_bytes for group in (*self._in_checkpoints, self._releasable))

    @property
    def _in_checkpoints(self) -> tuple[EntryGroup, ...]:
        return self._unsaved, self._writing, self._saved

    def _put_settled(self, entry_id: bytes, entry: PendingEntry) -> None:
        """Book an entry of a settled number; one that comes late joins the others of its fate."""
        number = entry.number
        durable = number in self._durable and not entry.has_images
        if durable or number in self._in_older:
            self._releasable.put(entry_id, entry)
            return
        if not entry.has_images:
            self._awaits_journal.setdefault(number, []).append(entry_id)
        if number in self._in_newest:
            self._saved.put(entry_id, entry)
        elif number in self._in_written:
            self._writing.put(entry_id, entry)
        else:
            self._unsaved.put(entry_id, entry)

    def _release(self, entry_id: bytes) -> None:
        """Let go of a settled entry before its checkpoint: its record is durable in the journal."""
        for group in self._in_checkpoints:
            entry = group.take_out(entry_id)
            if entry is not None:
                self._releasable.put(entry_id, entry)
