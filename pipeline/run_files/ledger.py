"""The ledger of a run: which numbers are settled, and how.

A number is settled once its fate is fixed: trained, or not trained for a stated reason. The ledger
is written with each checkpoint, and cut back when the run resumes from one. `RangeSet` keeps
numbers as ranges: they settle nearly in order, so a million of them take a few dozen pairs.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from onstream.settings.decoding import UNDECODABLE

Fate = Literal["trained", "dead", "stale", "not_verified", "group_dead", "purged"]


class Settled(msgspec.Struct, frozen=True):
    """One line of `trained.jsonl`: `number` met its `fate` in the training step `step`."""

    number: int
    fate: Fate
    step: int


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


class Ledger:
    """`trained.jsonl`: append-only, one line per settled number, durable when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Iterable[Settled]) -> int:
        """Write `lines` and sync them; returns the file's size in bytes, for the checkpoint."""
        encode = msgspec.json.Encoder().encode
        with self.path.open("ab") as file:
            file.write(b"".join(encode(line) + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, size_bytes: int) -> int:
        """Cut the file back to the size that a checkpoint holds.

        Returns how many bytes it is too short (0 in an intact run).
        """
        have = self.path.stat().st_size if self.path.exists() else 0
        if have > size_bytes:
            os.truncate(self.path, size_bytes)
        return max(0, size_bytes - have)

    def rewrite(self, lines: Iterable[Settled]) -> int:
        """Replace the whole file by `lines`; returns its size in bytes."""
        self.path.unlink(missing_ok=True)
        return self.append(lines)

    def read(self) -> Iterator[Settled]:
        """The lines in the order written. A last line still being written is left out.

        Raises:
            ValueError: a complete line is no line of a ledger.
        """
        decode = msgspec.json.Decoder(Settled).decode
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for at, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield decode(line)
                except UNDECODABLE as error:
                    raise ValueError(f"{self.path}, line {at}: {error}") from error
