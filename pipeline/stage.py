"""What a worker gives to the one loop (`onstream.pipeline.loop`), and what it gets from it.

A stream entry becomes a `Delivery` for the stage; its `Outcome` becomes the move of that entry.
Nothing here talks to Redis.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from onstream.pipeline.record_codec import RecordError, decode_work, encode
from onstream.pipeline.records import (
    REASON_CHARACTERS,
    Episode,
    Rollout,
    Ticket,
    Timing,
    Tombstone,
    Work,
)
from onstream.pipeline.redis.streams import Entry, Move, Out
from onstream.pipeline.telemetry import is_logged
from onstream.settings.stages import FIRST, STAGES, StageName, StreamName, stage_of, takes_tickets

log = structlog.get_logger(__name__)

RECORDS: dict[str, type[Work]] = {
    record.__name__: record for record in (Ticket, Episode, Rollout, Tombstone)
}
TAKES: dict[StageName, tuple[type[Work], ...]] = {
    stage.name: tuple(RECORDS[name] for name in stage.takes) for stage in STAGES
}


VERSIONS_AHEAD = 16
"""How far ahead of what Redis knows the version of a rollout under way may be. A replica that has
taken over may not know the newest ones yet. The trainer, which announces them, knows all.
"""


@dataclass(frozen=True)
class Delivery:
    """One stream entry in this worker's hands.

    `deliveries` counts how often it was handed out, this time included. `taken` is when this worker
    got it, in seconds since the epoch.
    """

    entry_id: bytes
    number: int
    record: Work
    payload_bytes: int
    deliveries: int
    taken: float

    @property
    def ticket(self) -> Ticket:
        """The ticket of an entry of the stages `generate` and `act`: itself, or the episode's."""
        if isinstance(self.record, Episode):
            return self.record.ticket
        if not isinstance(self.record, Ticket):
            raise TypeError(f"number {self.number} is a {type(self.record).__name__}, no Ticket")
        return self.record

    @property
    def rollout(self) -> Rollout:
        """The record of an entry of a stage that takes rollouts alone."""
        if not isinstance(self.record, Rollout):
            raise TypeError(f"number {self.number} is a {type(self.record).__name__}, no Rollout")
        return self.record


@dataclass(frozen=True)
class Outcome:
    """A stage is done with `delivery`: the record that goes on, or the reason why none does.

    `record` moves to the first stage of its own route, and a tombstone to the trainer. With `dead`
    set, the entry goes to the dead letters for that reason, and a tombstone to the trainer. With
    `elsewhere` set, somebody else has moved the entry, a job say. The loop calls `complete_stage`.
    """

    delivery: Delivery
    record: Episode | Rollout | Tombstone | None = None
    dead: str | None = None
    elsewhere: bool = False


def complete_stage(record: Episode | Rollout, stage: StreamName, worker: str, taken: float) -> None:
    """Take `stage` off the route of `record`, where that begins with it, and add its timing:
    `worker` had the record from `taken` until now, in seconds since the epoch.
    """
    if record.route[:1] == [stage]:
        record.route = record.route[1:]
    if not record.timings or record.timings[-1].stage != stage:
        record.timings = [*record.timings, Timing(stage, worker, taken, time.time())]


@dataclass
class Stats:
    """What a worker's heartbeat says. `detail` is what it waits for, or does, in words.

    The loop counts `done` and `dead` itself, except for the trainer, which counts its own.

    The heartbeat's thread reads this while the stage's thread writes. So `numbers` is never changed
    in place, which could break an iteration over it: `set` and `add` put a new mapping there.
    """

    done: int = 0
    dead: int = 0
    detail: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    phase_since: float = float("-inf")
    """When the newest phase of a slice began, monotonic: each may take `delivery.max_handle`."""

    def begin_phase(self) -> None:
        """Say that another phase of the slice begins: a step, a publication, a checkpoint."""
        self.phase_since = time.monotonic()

    def set(self, **numbers: float) -> None:
        """Set some of the numbers."""
        self.numbers = {**self.numbers, **numbers}

    def add(self, name: str, amount: float) -> None:
        """Add to one number, which begins at 0."""
        self.numbers = {**self.numbers, name: self.numbers.get(name, 0.0) + amount}


def count_trouble(stats: Stats, text: str, kind: str, number: int, reason: str | None) -> None:
    """Count what went wrong with rollout `number`; the 1st, 2nd, 4th … of its kind is logged.

    Args:
        text: what went wrong, in words.
        kind: the name of its count in `stats`.
    """
    stats.add(kind, 1)
    times = int(stats.numbers[kind])
    if is_logged(times - 1, times):
        log.warning(text, number=number, what=kind, reason=reason, times=times)


class Stage(Protocol):
    """One kind of worker. The loop calls these from one thread, `setup` first and `close` last.

    `holds_entries` is True for the trainer alone. Its entries stay pending until a durable
    checkpoint acknowledges them. So the loop takes all that is pending at the start, claims nothing
    as idle after that, and gives nothing back when it drains.
    """

    holds_entries: bool
    stats: Stats

    @property
    def name(self) -> StreamName:
        """The stream that it consumes."""
        ...

    def setup(self) -> None:
        """Load models and open files.

        Raises:
            UserError: the worker cannot do its work with these settings; the message says what to
                change.
        """
        ...

    @property
    def room(self) -> int:
        """How many more records the worker wants now; 0 while it is full."""
        ...

    @property
    def busy(self) -> bool:
        """Whether `handle([])` has work to do. While it has, the loop does not wait for records."""
        ...

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Take `new` records and do one bounded slice of work; returns the outcomes that are ready.

        Every delivery gets exactly one outcome, now or in a later call; from a stage that holds
        its entries, what it refuses alone.
        """
        ...

    def close(self, *, finished: bool) -> None:
        """Release everything. `finished` tells a run that has ended from a drain in its middle."""
        ...


class NotForThisStage(Exception):
    """An entry that the stage must not be given; the message is the reason of its dead letter.

    `number` is the rollout that dies of it; 0 where it is none that the run has issued.
    """

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.number = number


class Limits(Protocol):
    """Which numbers and policy versions the run has come to, and which stages its rollouts pass."""

    @property
    def issued(self) -> int: ...
    @property
    def version(self) -> int: ...
    def was_issued(self, number: int) -> bool: ...
    def was_announced(self, version: int, ahead: int = 0) -> bool: ...
    @property
    def path(self) -> tuple[StreamName, ...]: ...
    def leads_on(self, path: Sequence[StreamName]) -> bool: ...


def delivery_of(entry: Entry, stage: StreamName, limits: Limits) -> Delivery:
    """The delivery of `entry` to `stage`: the one gate that every record passes at every stage.

    Raises:
        NotForThisStage: its bytes are no record, or one that the stage does not take, or one of
            another number, or of a number or a policy version beyond the `limits`, or of a route
            that is not the run's.
    """
    try:
        record = decode_work(entry.payload)
    except RecordError as error:
        number = entry.number if limits.was_issued(entry.number) else 0
        raise NotForThisStage(str(error), number) from error
    number = entry.number or record.number
    if not limits.was_issued(number):
        raise NotForThisStage(
            f"number {number} was never issued; the run has issued 1 to {limits.issued}", 0
        )
    if not isinstance(record, TAKES[stage_of(stage)]):
        raise NotForThisStage(f"{_with_article(record)} in the stream of {stage}", number)
    if record.number != entry.number:
        reason = f"the entry has the number {entry.number} and its record {record.number}"
        raise NotForThisStage(reason, number)
    if problem := _misplaced(record, stage, limits):
        raise NotForThisStage(problem, number)
    size_bytes = len(entry.payload)
    return Delivery(entry.id, record.number, record, size_bytes, entry.deliveries, time.time())


def _misplaced(record: Work, stage: StreamName, limits: Limits) -> str | None:
    """Why `record` cannot be at `stage` of this run, in words; None where it can."""
    if isinstance(record, Tombstone):
        return None
    version = newest_version(record)
    passing = not isinstance(record, Ticket) and stage != "train"
    if not limits.was_announced(version, VERSIONS_AHEAD if passing else 0):
        return f"policy version {version} was never announced; the newest is {limits.version}"
    if isinstance(record, Ticket):
        path = [FIRST, *record.route]
        right: StreamName = takes_tickets(record.route)
    else:
        path = record.route
        right = record.route[0]
    if right != stage:
        goes_on = " → ".join(record.route)
        return f"{_with_article(record)} at {stage} whose route goes on with {goes_on}"
    if not limits.leads_on(path):
        # A stage that nobody works at would keep it for ever.
        return f"the route {' → '.join(path)}; rollouts of this run pass {' → '.join(limits.path)}"
    return None


def _with_article(record: Work) -> str:
    name = type(record).__name__.lower()
    return f"an {name}" if isinstance(record, Episode) else f"a {name}"


def newest_version(record: Ticket | Episode | Rollout) -> int:
    """The newest policy version that `record` names; −1 where it names none."""
    if isinstance(record, Ticket):
        return record.min_policy_version
    newest = -1
    for sample in record.samples:
        for span in sample.version_spans:
            newest = max(newest, span.version)
    return newest


def move_of(outcome: Outcome, stage: StreamName, worker: str) -> Move:
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


def dead_letter(entry: Entry, stage: StreamName, reason: str) -> Move:
    """The move of `entry` to the dead letters, with a tombstone for the trainer where its number is
    known.
    """
    number = entry.number
    reason = reason[:REASON_CHARACTERS]
    log.error("dead letter", number=number, reason=reason, deliveries=entry.deliveries)
    outs = [Out("dead", number, entry.payload, reason, entry.deliveries)]
    if number > 0:
        outs.append(Out("train", number, encode(Tombstone(number, stage, reason))))
    return Move(entry.id, outs)
