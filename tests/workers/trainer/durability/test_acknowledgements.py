"""Which entries may be acknowledged, and when."""

from typing import Any

from onstream.pipeline.records import PolicyVersion, Tombstone
from onstream.pipeline.run_files.ledger import Settled
from onstream.pipeline.stage import Delivery
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import TrainerState


def entry(number: int, entry_id: bytes | None = None) -> Delivery:
    entry_id = entry_id or b"%d-0" % number
    return Delivery(
        entry_id,
        number,
        Tombstone(number, "verify", "test"),
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


def test_an_entry_is_payable_when_the_checkpoint_after_the_one_that_settled_it_is_durable() -> None:
    acknowledgements = Acknowledgements(None)
    for number in (1, 2, 3):
        assert acknowledgements.take(entry(number))
    acknowledgements.settle([1, 2], "trained", step=1)
    assert list(acknowledgements.payable()) == []
    acknowledgements.durable()
    acknowledgements.settle([3], "stale", step=2)
    assert list(acknowledgements.payable()) == []
    acknowledgements.durable()
    assert list(acknowledgements.payable()) == [b"1-0", b"2-0"]
    acknowledgements.durable()
    assert list(acknowledgements.payable()) == [b"1-0", b"2-0", b"3-0"]
    acknowledgements.paid([b"1-0", b"3-0"])
    assert list(acknowledgements.payable()) == [b"2-0"]


def test_a_number_counts_once_however_often_its_entry_comes() -> None:
    acknowledgements = Acknowledgements(None)
    assert acknowledgements.take(entry(1))
    assert not acknowledgements.take(entry(1))
    assert not acknowledgements.take(entry(1, b"9-9"))
    acknowledgements.settle([1], "trained", step=1)
    assert not acknowledgements.take(entry(1))
    acknowledgements.durable()
    acknowledgements.durable()
    assert sorted(acknowledgements.payable()) == [b"1-0", b"9-9"]


def test_an_unsettled_entry_is_never_payable() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.take(entry(1))
    acknowledgements.durable()
    acknowledgements.durable()
    acknowledgements.durable()
    assert list(acknowledgements.payable()) == []


def test_after_a_resume_what_the_older_checkpoint_held_is_payable_at_once() -> None:
    acknowledgements = Acknowledgements(
        state(settled={"trained": [(1, 8)], "dead": [(9, 9)]}, before=[(1, 4)])
    )
    assert [acknowledgements.take(entry(number)) for number in (4, 5, 9, 10)] == [
        False,
        False,
        False,
        True,
    ]
    assert list(acknowledgements.payable()) == [b"4-0"]
    acknowledgements.durable()
    assert list(acknowledgements.payable()) == [b"4-0", b"5-0", b"9-0"]


def test_settled_bytes_are_counted_until_they_are_paid() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.take(entry(1))
    assert acknowledgements.unacked_bytes == 0
    acknowledgements.settle([1], "trained", step=1)
    assert (acknowledgements.since_bytes, acknowledgements.unacked_bytes) == (10, 10)
    acknowledgements.durable()
    assert (acknowledgements.since_bytes, acknowledgements.unacked_bytes) == (0, 10)
    acknowledgements.durable()
    acknowledgements.paid(acknowledgements.payable())
    assert acknowledgements.unacked_bytes == 0


def test_the_books_hold_each_fate_and_the_lines_not_written_yet() -> None:
    acknowledgements = Acknowledgements(None)
    acknowledgements.settle([1, 2, 3], "trained", step=1)
    acknowledgements.settle([4], "dead", step=1)
    assert {fate: numbers.ranges() for fate, numbers in acknowledgements.fates.items()} == {
        "trained": [(1, 3)],
        "dead": [(4, 4)],
    }
    assert acknowledgements.lines[2:] == [Settled(3, "trained", 1), Settled(4, "dead", 1)]
    assert acknowledgements.before == []
    acknowledgements.durable()
    assert acknowledgements.lines == []
    assert acknowledgements.before == [(1, 4)]
