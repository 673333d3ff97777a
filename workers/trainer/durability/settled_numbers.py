"""Which numbers have settled, and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from onstream.pipeline.run_files.ledger import Fate, RangeSet, Settled

DEAD: tuple[Fate, ...] = ("dead", "group_dead")


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
