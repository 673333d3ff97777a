"""Which parts a reader takes, and which stay: by hand-made cases."""

from __future__ import annotations

import pytest

from onstream.pipeline.weights.store import VersionId, WeightPart, chain_to, useful_for


def full(number: int, size: int = 100, digest: str | None = None) -> WeightPart:
    return WeightPart(number, f"d{number}" if digest is None else digest, size, f"full {number}")


def delta(number: int, size: int = 10) -> WeightPart:
    return WeightPart(
        number, f"d{number}", size, f"delta {number}", VersionId(number - 1, f"d{number - 1}")
    )


def version(number: int) -> VersionId:
    return VersionId(number, f"d{number}")


DELTAS = [delta(number) for number in range(1, 9)]


@pytest.mark.parametrize(
    ("wanted", "have", "way"),
    [
        (8, 7, ["delta 8"]),
        (8, 5, ["delta 6", "delta 7", "delta 8"]),
        (8, 8, []),
        (8, None, ["full 4", "delta 5", "delta 6", "delta 7", "delta 8"]),
        (4, None, ["full 4"]),
        (4, 3, ["delta 4"]),
        (3, None, ["full 0", "delta 1", "delta 2", "delta 3"]),
        (3, 7, ["full 0", "delta 1", "delta 2", "delta 3"]),
        (9, 8, None),
    ],
)
def test_the_fewest_bytes_that_lead_there(
    wanted: int, have: int | None, way: list[str] | None
) -> None:
    found = chain_to(
        version(wanted), [full(0), full(4), *DELTAS], None if have is None else version(have)
    )
    assert (found and [part.place for part in found]) == way


def test_a_full_set_is_taken_where_the_deltas_are_more() -> None:
    parts = [full(0), full(8, size=25), *DELTAS]
    assert chain_to(version(8), parts, version(6)) == [delta(7), delta(8)]
    assert chain_to(version(8), parts, version(5)) == [full(8, size=25)]


def test_a_full_set_whose_digest_is_not_known_counts_for_its_number() -> None:
    assert chain_to(version(4), [full(4, digest="")], None) == [full(4, digest="")]
    assert chain_to(version(4), [full(4, digest="other")], None) is None


def test_deltas_that_lead_in_a_circle_end() -> None:
    around = [
        WeightPart(1, "d1", 5, "a", VersionId(2, "d2")),
        WeightPart(2, "d2", 5, "b", VersionId(1, "d1")),
    ]
    assert chain_to(version(1), around, None) is None


def test_of_use_is_the_newest_full_set_what_follows_and_the_delta_to_it() -> None:
    parts = [full(0), full(4), full(9), *DELTAS]
    assert [part.place for part in useful_for(6, parts)] == [
        "full 4",
        "delta 4",
        "delta 5",
        "delta 6",
    ]
    assert [part.place for part in useful_for(2, DELTAS[:2])] == ["delta 1", "delta 2"]
