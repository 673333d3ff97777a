"""Images in Redis: once, while a number needs them, whatever dies in between."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Timer

import pytest

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.image_store import BYTES_AT_ONCE, HELD_AT_ONCE, ImageHold, ImagesFull
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.streams import Entry, Move, Out
from tests.pipeline.stages import ticket

CAT = {"cat": b"c" * 5000}
DOG = {"dog": b"d" * 7000}


@pytest.fixture
def lease(bus: Bus) -> Lease:
    return bus.lease.acquire(5)


@pytest.fixture
def other(redis_url: str, run_name: str) -> Iterator[Bus]:
    bus = Bus.connect(redis_url, run_name, consumer="other", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.close()


def taken(bus: Bus, lease: Lease, count: int) -> list[Entry]:
    """Entries of `count` tickets, in the hands of this worker."""
    assert bus.lease.issue(
        lease, 0, [ticket(number) for number in range(1, count + 1)], max_backlog=1000
    )
    return bus.streams.read("generate", count)


def hold(bus: Bus, entry: Entry, images: dict[str, bytes], patience_s: float = 5) -> bool:
    (held,) = bus.images.hold(
        "generate", [ImageHold(entry.id, entry.number, images)], patience_s=patience_s
    )
    return held


def finish(bus: Bus, lease: Lease, entries: list[Entry]) -> None:
    """Move `entries` to the trainer, which reads them and acknowledges all."""
    bus.streams.move(
        "generate", [Move(entry.id, [Out("train", entry.number, b"rollout")]) for entry in entries]
    )
    bus.lease.acknowledge(
        lease, {entry.id: entry.number for entry in bus.streams.read("train", 100)}
    )


def redis_bytes(bus: Bus) -> int:
    return sum(map(len, bus.connection.ask("HVALS", bus.keys.images)))


def test_an_image_of_a_group_lies_in_redis_once_until_the_last_of_the_group_has_settled(
    bus: Bus, lease: Lease
) -> None:
    entries = taken(bus, lease, 16)
    assert all(hold(bus, entry, CAT) for entry in entries)
    assert redis_bytes(bus) == len(CAT["cat"])

    finish(bus, lease, entries[:15])
    assert bus.images.read(["cat"]) == [CAT["cat"]]

    finish(bus, lease, entries[15:])
    assert bus.images.read(["cat"]) == [None]
    assert bus.images.holding_numbers() == []
    assert (
        bus.connection.ask("EXISTS", bus.keys.images, bus.keys.images_counted, bus.keys.images_held)
        == 0
    )


def test_many_numbers_are_held_at_once_whatever_their_images_come_to(
    bus: Bus, lease: Lease
) -> None:
    """More entries than one call takes, over images of which no two go into one call, and one entry
    that somebody else has finished.
    """
    entries = taken(bus, lease, HELD_AT_ONCE + 10)
    images = [{f"image-{at}": bytes([at]) * (BYTES_AT_ONCE - 1)} for at in range(3)]
    bus.streams.move(
        "generate", [Move(entries[5].id, [Out("train", entries[5].number, b"rollout")])]
    )
    holds = [
        ImageHold(entry.id, entry.number, images[entry.number % 2] | images[2]) for entry in entries
    ]
    assert bus.images.hold("generate", holds, patience_s=5) == [
        entry is not entries[5] for entry in entries
    ]
    assert redis_bytes(bus) == 3 * (BYTES_AT_ONCE - 1)

    finish(bus, lease, [entry for entry in entries if entry is not entries[5]])
    assert (
        bus.connection.ask("EXISTS", bus.keys.images, bus.keys.images_counted, bus.keys.images_held)
        == 0
    )


def test_a_number_whose_image_has_changed_since_holds_both(bus: Bus, lease: Lease) -> None:
    (entry,) = taken(bus, lease, 1)
    assert hold(bus, entry, CAT)
    assert hold(bus, entry, DOG)
    assert all(bus.images.read(["cat", "dog"]))
    finish(bus, lease, [entry])
    assert redis_bytes(bus) == 0


def test_the_same_number_counts_once_however_often_it_is_handed_out(
    bus: Bus, lease: Lease, other: Bus
) -> None:
    (entry,) = taken(bus, lease, 1)
    assert hold(bus, entry, CAT | DOG)
    (again,) = other.streams.claim("generate", bus.streams.pending_rows("generate"))
    assert hold(other, again, CAT | DOG)
    finish(other, lease, [again])
    assert redis_bytes(bus) == 0


def test_who_comes_late_leaves_no_image_behind(bus: Bus, lease: Lease, other: Bus) -> None:
    (entry,) = taken(bus, lease, 1)
    (again,) = other.streams.claim("generate", bus.streams.pending_rows("generate"))
    assert hold(other, again, CAT)
    finish(bus, lease, [again])
    assert hold(bus, entry, CAT) is False
    assert redis_bytes(bus) == 0


def test_a_dead_rollout_lets_its_images_go_with_its_tombstone(bus: Bus, lease: Lease) -> None:
    (entry,) = taken(bus, lease, 1)
    assert hold(bus, entry, CAT)
    bus.streams.move(
        "generate",
        [
            Move(
                entry.id, [Out("dead", 1, b"rollout", "it broke", 4), Out("train", 1, b"tombstone")]
            )
        ],
    )
    assert bus.images.read(["cat"]) != [None]
    bus.lease.acknowledge(
        lease, {found.id: found.number for found in bus.streams.read("train", 10)}
    )
    assert bus.images.read(["cat"]) == [None]


def test_numbers_that_settled_without_an_entry_can_be_let_go(bus: Bus, lease: Lease) -> None:
    first, second = taken(bus, lease, 2)
    assert hold(bus, first, CAT)
    assert hold(bus, second, CAT | DOG)
    assert sorted(bus.images.holding_numbers()) == [1, 2]
    bus.images.release(lease, [2])
    assert bus.images.read(["dog"]) == [None]
    assert bus.images.read(["cat"]) != [None]
    bus.images.release(lease, [1, 2])
    assert redis_bytes(bus) == 0


def test_a_full_redis_is_waited_for_and_in_the_end_said(bus: Bus, lease: Lease) -> None:
    (entry,) = taken(bus, lease, 1)
    limit = bus.connection.ask("CONFIG", "GET", "maxmemory")
    before = int(dict(limit)[b"maxmemory"]) if isinstance(limit, dict) else int(limit[1])
    bus.connection.ask("CONFIG", "SET", "maxmemory", 1)
    freed = Timer(0.5, lambda: bus.connection.ask("CONFIG", "SET", "maxmemory", before))
    try:
        with pytest.raises(ImagesFull, match="no room for the images of 1"):
            hold(bus, entry, CAT, patience_s=0)
        freed.start()
        assert hold(bus, entry, CAT)
    finally:
        freed.cancel()
        bus.connection.ask("CONFIG", "SET", "maxmemory", before)
