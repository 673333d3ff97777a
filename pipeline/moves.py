"""What becomes of a stream entry: a delivery for the stage, then the move that its outcome needs.

Nothing here talks to Redis.
"""

from __future__ import annotations

import time

import structlog

from onstream.pipeline.records import (
    RecordError,
    Rollout,
    StageName,
    Ticket,
    Tombstone,
    Work,
    decode_work,
    encode,
)
from onstream.pipeline.redis.streams import Entry, Move, Out
from onstream.pipeline.stage import Delivery, Outcome, complete_stage
from onstream.settings.stages import STAGES

log = structlog.get_logger(__name__)

RECORDS: dict[str, type[Work]] = {
    record.__name__: record for record in (Ticket, Rollout, Tombstone)
}
TAKES: dict[StageName, tuple[type[Work], ...]] = {
    stage.name: tuple(RECORDS[name] for name in stage.takes) for stage in STAGES
}


class NotForThisStage(Exception):
    """An entry that the stage must not be given; the message is the reason of its dead letter."""


def delivery_of(entry: Entry, stage: StageName) -> Delivery:
    """The delivery of `entry` to `stage`.

    Raises:
        NotForThisStage: its bytes are no record, or one that the stage does not take, or one of
            another number.
    """
    try:
        record = decode_work(entry.payload)
    except RecordError as error:
        raise NotForThisStage(str(error)) from error
    if not isinstance(record, TAKES[stage]):
        raise NotForThisStage(f"a {type(record).__name__} in the stream of {stage}")
    if record.number != entry.number:
        raise NotForThisStage(
            f"the entry has the number {entry.number} and its record {record.number}"
        )
    size_bytes = len(entry.payload)
    return Delivery(entry.id, record.number, record, size_bytes, entry.deliveries, time.time())


def move_of(outcome: Outcome, stage: StageName, worker: str) -> Move:
    """The move that `outcome` of `stage` asks for.

    Raises:
        ValueError: the stage returned neither a record nor a reason, or a record without a route.
    """
    delivery = outcome.delivery
    record = outcome.record
    if outcome.dead is not None:
        payload = encode(delivery.record)
        entry = Entry(delivery.entry_id, delivery.number, payload, delivery.deliveries)
        return dead_letter(entry, stage, outcome.dead)
    if isinstance(record, Tombstone):
        return Move(delivery.entry_id, [Out("train", delivery.number, encode(record))])
    if record is None:
        raise ValueError(
            f"{stage} returned neither a record nor a reason for the rollout {delivery.number}"
        )
    complete_stage(record, stage, worker, delivery.taken)
    if not record.route:
        raise ValueError(f"{stage} returned the rollout {delivery.number} with an empty route")
    return Move(delivery.entry_id, [Out(record.route[0], delivery.number, encode(record))])


def dead_letter(entry: Entry, stage: StageName, reason: str) -> Move:
    """The move of `entry` to the dead letters, with a tombstone for the trainer where its number is
    known.
    """
    number = entry.number
    log.error("dead letter", number=number, reason=reason, deliveries=entry.deliveries)
    outs = [Out("dead", number, entry.payload, reason, entry.deliveries)]
    if number > 0:
        outs.append(Out("train", number, encode(Tombstone(number, stage, reason))))
    return Move(entry.id, outs)
