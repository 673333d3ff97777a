"""Sets of numbers, kept as ranges."""

from __future__ import annotations

import itertools
import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from onstream.workers.trainer.durability.acknowledgements import RangeSet

numbers = st.integers(1, 60)
spans = st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))


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


def test_a_number_taken_out_splits_its_range() -> None:
    numbers = RangeSet([(1, 5), (8, 8)])
    for number in (3, 8, 5, 7):
        numbers.discard(number)
    assert numbers.ranges() == [(1, 2), (4, 4)]


@given(st.lists(st.tuples(st.sampled_from(["add", "discard"]), spans)))
def test_a_range_set_is_the_set_of_its_numbers_after_any_steps(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    ranges = RangeSet()
    plain = set[int]()
    for step, (first, last) in steps:
        if step == "add":
            ranges.add(first, last)
            plain |= set(range(first, last + 1))
        else:
            ranges.discard(first)
            plain.discard(first)
        assert (list(ranges), len(ranges)) == (sorted(plain), len(plain))
        pairs = ranges.ranges()
        assert all(a <= b for a, b in pairs) and all(
            before[1] + 1 < after[0] for before, after in itertools.pairwise(pairs)
        )
    assert all((number in ranges) == (number in plain) for number in range(62))
    assert list(ranges.missing(61)) == [number for number in range(1, 62) if number not in plain]
    assert (
        RangeSet(msgspec.json.decode(msgspec.json.encode(ranges.ranges())))
        == ranges.copy()
        == ranges
    )


@given(st.sets(numbers), st.sets(numbers))
def test_an_update_is_a_union(left: set[int], right: set[int]) -> None:
    ranges = RangeSet.of(left)
    ranges.update(RangeSet.of(right))
    assert list(ranges) == sorted(left | right)
