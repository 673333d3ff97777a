"""Which entries may be acknowledged, and when."""

import sys
from typing import Any

import pytest

from onstream.pipeline.records import PolicyVersion, Tombstone
from onstream.pipeline.run_files.ledger import Fate, Settled
from onstream.pipeline.stage import Delivery
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import TrainerState
from tests.workers.trainer.records import rollout


def entry(number: int, entry_id: bytes | None = None, *, images: bool = False) -> Delivery:
    entry_id = entry_id or b"%d-0" % number
    record = rollout(number)
    record.samples[0].images = ["a picture"] if images else []
    return Delivery(
        entry_id,
        number,
        record if images else Tombstone(number, "verify", "test"),
        payload_bytes=10,
        deliveries=1,
        taken=0.0,
    )


def state(**changes: Any) -> TrainerState:
    base = TrainerState(
        sequence=2,
        step=4,
        policy=PolicyVersion(4, "d", "p", 1),
        issued=16,
        settled={},
        before=[],
        ledger_bytes=0,
        totals={},
    )
    return TrainerState(
        **{name: changes.get(name, getattr(base, name)) for name in base.__struct_fields__}
    )


def settled(numbers: list[int], fate: Fate, step: int) -> list[Settled]:
    return [Settled(number, fate, step) for number in numbers]


def test_an_entry_is_releasable_when_the_checkpoint_after_the_one_that_settled_it_is_durable() -> (
    None
):
    acknowledgements = Acknowledgements(None)
    for number in (1, 2, 3):
        assert acknowledgements.take(entry(number))
    acknowledgements.settle(settled([1, 2], "trained", step=1))
    assert list(acknowledgements.releasable()) == []
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    acknowledgements.settle(settled([3], "stale", step=2))
    assert list(acknowledgements.releasable()) == []
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert list(acknowledgements.releasable()) == [b"1-0", b"2-0"]
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert list(acknowledgements.releasable()) == [b"1-0", b"2-0", b"3-0"]
    acknowledgements.released([b"1-0", b"3-0"])
    assert list(acknowledgements.releasable()) == [b"2-0"]


def test_a_number_counts_once_however_often_its_entry_comes() -> None:
    acknowledgements = Acknowledgements(None)
    assert acknowledgements.take(entry(1))
    assert not acknowledgements.take(entry(1))
    assert not acknowledgements.take(entry(1, b"9-9"))
    acknowledgements.settle(settled([1], "trained", step=1))
    assert not acknowledgements.take(entry(1))
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert sorted(acknowledgements.releasable()) == [b"1-0", b"9-9"]


def test_an_unsettled_entry_is_never_releasable() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.take(entry(1))
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert list(acknowledgements.releasable()) == []


def test_after_a_resume_what_the_older_checkpoint_held_is_releasable_at_once() -> None:
    acknowledgements = Acknowledgements(
        state(settled={"trained": [(1, 8)], "dead": [(9, 9)]}, before=[(1, 4)])
    )
    assert [acknowledgements.take(entry(number)) for number in (4, 5, 9, 10)] == [
        False,
        False,
        False,
        True,
    ]
    assert list(acknowledgements.releasable()) == [b"4-0"]
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert list(acknowledgements.releasable()) == [b"4-0", b"5-0", b"9-0"]


def test_settled_bytes_are_counted_until_they_are_released() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.take(entry(1, images=True))
    assert acknowledgements.unacked_bytes == 0
    acknowledgements.settle(settled([1], "trained", step=1))
    assert (acknowledgements.unsaved_bytes, acknowledgements.unacked_bytes) == (10, 10)
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert (acknowledgements.unsaved_bytes, acknowledgements.unacked_bytes) == (0, 10)
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    acknowledgements.released(acknowledgements.releasable())
    assert acknowledgements.unacked_bytes == 0


def test_a_settled_entry_goes_when_its_record_is_durable_in_the_journal() -> None:
    acknowledgements = Acknowledgements(None)
    for number in (1, 2, 3):
        acknowledgements.take(entry(number))
    acknowledgements.journalled([(1, 100), (2, 200), (3, 300)])
    acknowledgements.settle(settled([1, 3], "trained", step=1))
    acknowledgements.journal_is_durable(299)
    assert list(acknowledgements.releasable()) == [b"1-0"], "2 is open, and 3 not on the disk"
    acknowledgements.journal_is_durable(300)
    assert list(acknowledgements.releasable()) == [b"1-0", b"3-0"]
    acknowledgements.settle(settled([2], "stale", step=2))
    assert not acknowledgements.take(entry(2, b"9-9"))
    acknowledgements.journal_is_durable(300)
    assert set(acknowledgements.releasable()) == {b"1-0", b"2-0", b"3-0", b"9-9"}


def test_an_entry_with_images_waits_for_the_checkpoint_after_the_one_that_settled_it() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.take(entry(1, images=True))
    acknowledgements.journalled([(1, 100)])
    acknowledgements.settle(settled([1], "trained", step=1))
    for _ in range(2):
        acknowledgements.journal_is_durable(100)
        assert list(acknowledgements.releasable()) == []
        assert acknowledgements.waiting_bytes == 10
        acknowledgements.checkpoint_begins()
        acknowledgements.checkpoint_is_durable()
    assert list(acknowledgements.releasable()) == [b"1-0"]


def test_every_fate_is_known_and_every_line_not_written_yet() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.settle(settled([1, 2, 3], "trained", step=1))
    acknowledgements.settle(settled([4], "dead", step=1))
    assert acknowledgements.settled.ranges() == {
        "trained": [(1, 3)],
        "dead": [(4, 4)],
    }
    assert acknowledgements.unsaved_lines[2:] == [Settled(3, "trained", 1), Settled(4, "dead", 1)]
    assert acknowledgements.in_newest_checkpoint == []
    acknowledgements.checkpoint_begins()
    acknowledgements.checkpoint_is_durable()
    assert acknowledgements.unsaved_lines == []
    assert acknowledgements.in_newest_checkpoint == [(1, 4)]


def test_what_settles_while_a_checkpoint_is_written_is_for_the_next_one() -> None:
    acknowledgements = Acknowledgements(None)
    for number in (1, 2):
        acknowledgements.take(entry(number, images=True))
    acknowledgements.settle(settled([1], "trained", step=1))
    assert acknowledgements.checkpoint_begins() == settled([1], "trained", step=1)
    acknowledgements.settle(settled([2], "trained", step=2))
    acknowledgements.take(entry(1, b"1-9", images=True))
    assert (acknowledgements.unsaved_bytes, acknowledgements.waiting_bytes) == (10, 30)
    acknowledgements.checkpoint_is_durable()
    assert acknowledgements.in_newest_checkpoint == [(1, 1)]
    assert acknowledgements.unsaved_lines == settled([2], "trained", step=2)
    acknowledgements.checkpoint_begins()
    assert list(acknowledgements.releasable()) == [], "the one before would need it"
    acknowledgements.checkpoint_is_durable()
    assert set(acknowledgements.releasable()) == {b"1-0", b"1-9"}


def test_what_a_failed_checkpoint_would_have_held_is_in_the_next_one() -> None:
    acknowledgements = Acknowledgements(None)
    for number in (1, 2, 3):
        acknowledgements.take(entry(number))
    acknowledgements.settle(settled([1], "trained", step=1))
    acknowledgements.checkpoint_begins()
    acknowledgements.settle(settled([2], "dead", step=2))
    acknowledgements.journalled([(1, 100), (3, 300)])
    acknowledgements.journal_is_durable(100)
    assert list(acknowledgements.releasable()) == [b"1-0"], "its record is in the journal"
    acknowledgements.checkpoint_failed()
    lines = settled([1], "trained", step=1) + settled([2], "dead", step=2)
    assert acknowledgements.unsaved_lines == lines
    assert acknowledgements.checkpoint_begins() == lines
    acknowledgements.checkpoint_is_durable()
    assert acknowledgements.in_newest_checkpoint == [(1, 2)]


@pytest.mark.parametrize("images", [True, False])
def test_a_turn_costs_the_same_however_many_entries_wait(images: bool) -> None:
    def calls(waiting: int) -> int:
        acknowledgements = Acknowledgements(None)
        numbers = list(range(1, waiting + 1))
        for number in numbers:
            acknowledgements.take(entry(number, images=images))
        acknowledgements.settle(settled(numbers, "trained", step=1))
        counted = 0

        def count(*_: object) -> None:
            nonlocal counted
            counted += 1

        sys.setprofile(count)
        acknowledgements.journal_is_durable(100)
        assert acknowledgements.unacked_bytes == 10 * waiting
        assert acknowledgements.unsaved_bytes == (10 * waiting if images else 0)
        sys.setprofile(None)
        return counted

    assert calls(1000) == calls(10)
