"""The ledger and its sets of numbers."""

import random
from pathlib import Path

import pytest

from onstream.pipeline.run_files.ledger import Ledger, RangeSet, Settled


def test_numbers_that_touch_become_one_range() -> None:
    numbers = RangeSet.of([5, 1, 3, 2, 9])
    assert numbers.ranges() == [(1, 3), (5, 5), (9, 9)]
    numbers.add(4)
    assert numbers.ranges() == [(1, 5), (9, 9)]


def test_a_range_swallows_the_ranges_it_covers() -> None:
    numbers = RangeSet([(1, 2), (5, 6), (9, 9), (20, 30)])
    numbers.add(4, 10)
    assert numbers.ranges() == [(1, 2), (4, 10), (20, 30)]


def test_a_range_set_is_the_set_of_its_numbers() -> None:
    draw = random.Random(7)
    for _ in range(50):
        numbers = RangeSet()
        expected = set[int]()
        for _ in range(60):
            first = draw.randint(1, 80)
            last = first + draw.choice([0, 0, 0, 1, 5])
            numbers.add(first, last)
            expected |= set(range(first, last + 1))
        assert list(numbers) == sorted(expected)
        assert len(numbers) == len(expected)
        assert [number for number in range(1, 101) if number in numbers] == sorted(expected)
        assert list(numbers.missing(90)) == sorted(set(range(1, 91)) - expected)
        assert RangeSet(numbers.ranges()) == numbers


def test_a_copy_changes_apart() -> None:
    numbers = RangeSet([(1, 3)])
    numbers.copy().add(4)
    assert 4 not in numbers


def test_update_joins_two_sets() -> None:
    numbers = RangeSet([(1, 3), (8, 9)])
    numbers.update(RangeSet([(4, 4), (20, 21)]))
    assert numbers.ranges() == [(1, 4), (8, 9), (20, 21)]


def test_missing_stops_at_its_bound() -> None:
    assert list(RangeSet([(3, 4), (7, 50)]).missing(6)) == [1, 2, 5, 6]
    assert list(RangeSet().missing(2)) == [1, 2]
    assert list(RangeSet([(1, 9)]).missing(4)) == []


def test_the_ledger_gives_back_its_lines_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    assert list(ledger.read()) == []
    ledger.append([Settled(2, "trained", 1), Settled(1, "dead", 1)])
    size = ledger.append([Settled(3, "stale", 2)])
    assert list(ledger.read()) == [
        Settled(2, "trained", 1),
        Settled(1, "dead", 1),
        Settled(3, "stale", 2),
    ]
    assert (tmp_path / "trained.jsonl").stat().st_size == size
    assert (tmp_path / "trained.jsonl").read_text().splitlines()[
        0
    ] == '{"number":2,"fate":"trained","step":1}'


def test_a_ledger_is_cut_back_to_what_a_checkpoint_remembers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    size = ledger.append([Settled(1, "trained", 1)])
    ledger.append([Settled(2, "trained", 2)])
    assert ledger.cut(size) == 0
    assert list(ledger.read()) == [Settled(1, "trained", 1)]


def test_a_ledger_shorter_than_its_checkpoint_says_by_how_much(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    size = ledger.append([Settled(1, "trained", 1)])
    assert ledger.cut(size + 11) == 11
    assert Ledger(tmp_path / "none.jsonl").cut(5) == 5


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    ledger.append([Settled(1, "trained", 1)])
    with ledger.path.open("ab") as file:
        file.write(b'{"number":2,"fa')
    assert list(ledger.read()) == [Settled(1, "trained", 1)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trained.jsonl"
    path.write_text(
        '{"number":1,"fate":"trained","step":1}\n{"number":2,"fate":"eaten","step":1}\n'
    )
    with pytest.raises(ValueError, match=r"trained\.jsonl, line 2: .*eaten"):
        list(Ledger(path).read())


def test_a_number_taken_out_splits_its_range() -> None:
    numbers = RangeSet([(1, 5), (8, 8)])
    for number in (3, 8, 5, 7):
        numbers.discard(number)
    assert numbers.ranges() == [(1, 2), (4, 4)]
