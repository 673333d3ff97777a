"""Streams of work: how entries are read, moved on, renewed, handed over and given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from redis.exceptions import ResponseError

from onstream.pipeline.record_codec import read_number
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection, batched
from onstream.pipeline.redis.keys import GROUP, PARKED
from onstream.settings.stages import StreamName, stage_of

log = structlog.get_logger(__name__)

# One script stalls every client of the server while it runs: about 0.2 ms per 64 KB.
HOP_RECORDS = 32
HOP_BYTES = 1 << 20
IDS_AT_ONCE = 256
ROWS_AT_ONCE = 1000
UNKNOWN_S = 0.5
"""How long Redis is not asked again for a count that it does not have."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stream entry in this worker's hands. `number` is 0 where it names none."""

    id: bytes
    number: int
    payload: bytes
    deliveries: int


@dataclass(frozen=True, slots=True)
class PendingRow:
    """An entry in some worker's hands, without its payload.

    It was handed out `deliveries` times, and last handed out or renewed `idle_s` seconds ago.
    """

    id: bytes
    consumer: str
    idle_s: float
    deliveries: int


@dataclass(frozen=True, slots=True)
class Out:
    """What a move writes: a record for a stream, or a dead letter (`to` is `dead`) with its
    `reason`.
    """

    to: StreamName
    number: int
    payload: bytes
    reason: str = ""
    deliveries: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """Entry `entry_id` leaves its stream, and `outs` are written, both or neither."""

    entry_id: bytes
    outs: Sequence[Out]

    @property
    def size_bytes(self) -> int:
        """Bytes of all that it writes."""
        return sum(len(out.payload) for out in self.outs)


class RunLimits:
    """The last number issued, the newest version announced, and the stages that rollouts pass, as
    last heard from Redis.
    """

    def __init__(
        self, connection: Connection, read_path: Callable[[], tuple[StreamName, ...]]
    ) -> None:
        self._read_path = read_path
        self._issued = _GrowingCount(connection, connection.keys.issued, 0)
        self._announced = _GrowingCount(connection, connection.keys.announced, -1)
        self._path_unknown_until = 0.0
        self.path: tuple[StreamName, ...] = ()
        """The streams that rollouts pass, the first included, those of all teachers beside one
        another; empty while no plan was found.
        """

    def note(
        self, *, issued: int = 0, version: int = -1, path: tuple[StreamName, ...] = ()
    ) -> None:
        """Take in what this worker knows: the plan's path, or what the trainer is about to do."""
        self._issued.note(issued)
        self._announced.note(version)
        self.path = path or self.path

    def was_issued(self, number: int) -> bool:
        """Whether the run has issued `number`."""
        return self._issued.reaches(number)

    def was_announced(self, version: int, ahead: int = 0) -> bool:
        """Whether the run has announced `version`, or one at most `ahead` older."""
        return self._announced.reaches(version - ahead)

    def leads_on(self, path: Sequence[StreamName]) -> bool:
        """Whether a record of this run passes the streams `path` from its first to the trainer.

        Redis is asked for the plan again before one is refused: another run may have the name now.
        Where it has none, having lost its data say, no path is refused.
        """
        if self._ends_with(path) or time.monotonic() < self._path_unknown_until:
            return True
        self.path = self._read_path()
        if not self.path:
            self._path_unknown_until = time.monotonic() + UNKNOWN_S
        return not self.path or self._ends_with(path)

    def _ends_with(self, path: Sequence[StreamName]) -> bool:
        if not self.path or self.path[-len(path) :] == tuple(path):
            return bool(self.path)
        # Teachers by name: a record passes the stream of one of them.
        stages = tuple(dict.fromkeys(map(stage_of, self.path)))
        ends = stages[-len(path) :] == tuple(map(stage_of, path))
        return ends and all(stream in self.path for stream in path)

    @property
    def issued(self) -> int:
        """The last number issued, as last heard."""
        return self._issued.heard

    @property
    def version(self) -> int:
        """The newest version announced, as last heard; −1 before the first."""
        return self._announced.heard


class _GrowingCount:
    """A count in Redis that only grows, so Redis is asked again for a number beyond it alone.

    Where Redis does not know it, having lost its data say, nothing is beyond it: the trainer
    restores it.
    """

    def __init__(self, connection: Connection, key: str, start: int) -> None:
        self._connection = connection
        self._key = key
        self._unknown_until = 0.0
        self.heard = start

    def note(self, count: int) -> None:
        self.heard = max(self.heard, count)

    def reaches(self, number: int) -> bool:
        if number <= self.heard or time.monotonic() < self._unknown_until:
            return True
        count: bytes | None = self._connection.ask("GET", self._key)
        if count is None or not count.isdigit():
            self._unknown_until = time.monotonic() + UNKNOWN_S
            return True
        self.note(read_number(count))
        return number <= self.heard


class Streams:
    """The streams of work of one run, as one worker reads and writes them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = connection.keys

    def read(self, stage: StreamName, count: int, block_s: float = 0) -> list[Entry]:
        """Up to `count` new entries, waiting up to `block_s` for the first.

        For the main thread alone.

        Raises:
            redis.ConnectionError, redis.TimeoutError: Redis is away. The reply may have been lost
                with entries in it, which are then pending with this worker.
        """
        wait = ["BLOCK", max(1, round(block_s * 1000))] if block_s > 0 else []
        stream = self._keys.streams[stage]
        consumer = self._connection.consumer
        command = ["XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, *wait]
        try:
            reply = self._connection.block(*command, "STREAMS", stream, ">")
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            log.warning(
                "the stream or its group is gone; creating them again",
                stream=stream,
                error=str(error),
            )
            self._connection.create_groups()
            return []
        return [
            _entry(entry_id, fields, 1)
            for _, entries in reply or []
            for entry_id, fields in entries
        ]

    def look_at(self, stage: StreamName, entry_id: bytes) -> Entry | None:
        """The entry `entry_id`, whoever has it; None when it has moved on. Counts no delivery."""
        found = self._connection.ask("XRANGE", self._keys.streams[stage], entry_id, entry_id)
        return next((_entry(found_id, fields, 0) for found_id, fields in found), None)

    def pending_rows(
        self,
        stage: StreamName,
        *,
        after: bytes = b"0",
        count: int = 256,
        consumer: str | None = None,
        min_idle_s: float = 0,
    ) -> list[PendingRow]:
        """Up to `count` pending entries after the entry `after`, in order.

        Only those of `consumer`, where it is given, and only those idle for `min_idle_s` or longer.
        """
        idle = ["IDLE", round(min_idle_s * 1000)] if min_idle_s > 0 else []
        whose = [] if consumer is None else [consumer]
        rows = self._connection.ask(
            "XPENDING",
            self._keys.streams[stage],
            GROUP,
            *idle,
            b"(" + after,
            "+",
            count,
            *whose,
            parse_detail=True,
        )
        return [
            PendingRow(
                row["message_id"],
                row["consumer"].decode(),
                row["time_since_delivered"] / 1000,
                row["times_delivered"],
            )
            for row in rows
        ]

    def all_pending_rows(
        self, stage: StreamName, consumer: str | None = None
    ) -> Iterator[PendingRow]:
        """Every pending entry of `stage`, in order, read page by page."""
        rows = self.pending_rows(stage, count=ROWS_AT_ONCE, consumer=consumer)
        while rows:
            yield from rows
            rows = self.pending_rows(
                stage, after=rows[-1].id, count=ROWS_AT_ONCE, consumer=consumer
            )

    def claim(
        self, stage: StreamName, rows: Sequence[PendingRow], min_idle_s: float = 0
    ) -> list[Entry]:
        """Take over those of `rows` that are still idle for `min_idle_s`; counts as a delivery.

        Another worker may have claimed or renewed the rest meanwhile: XCLAIM looks again.
        """
        if not rows:
            return []
        deliveries = {row.id: row.deliveries + 1 for row in rows}
        stream = self._keys.streams[stage]
        idle_ms = round(min_idle_s * 1000)
        claimed = self._connection.ask(
            "XCLAIM", stream, GROUP, self._connection.consumer, idle_ms, *deliveries
        )
        if any(entry_id is None for entry_id, _ in claimed):
            self._forget_deleted(stage, deliveries)
        return [
            _entry(entry_id, fields, deliveries[entry_id])
            for entry_id, fields in claimed
            if entry_id is not None
        ]

    def _forget_deleted(self, stage: StreamName, ids: Iterable[bytes]) -> None:
        """Acknowledge those of `ids` that somebody deleted from the stream.

        Redis 6.2 would keep them pending for ever.
        """
        stream = self._keys.streams[stage]
        gone = [
            entry_id
            for entry_id in ids
            if not self._connection.ask("XRANGE", stream, entry_id, entry_id)
        ]
        log.error(
            "pending entries were deleted from outside; their numbers are lost",
            stream=stream,
            entries=[i.decode() for i in gone],
        )
        self._connection.ask("XACK", stream, GROUP, *gone)

    def move(self, stage: StreamName, moves: Sequence[Move]) -> list[bool]:
        """Move entries on: each leaves the stream of `stage` and its outs are written, or neither.

        Returns which of them moved. False means that somebody else was first, which is no error: a
        worker that slept past its lease finds its entry finished by another.
        """
        return [moved for batch in hop_batches(moves) for moved in self._hop(stage, batch)]

    def _hop(self, stage: StreamName, moves: Sequence[Move]) -> list[bool]:
        targets: dict[str, int] = {}
        args: list[Any] = [GROUP]
        for move in moves:
            args += [move.entry_id, len(move.outs)]
            for out in move.outs:
                key = self._keys.dead if out.to == "dead" else self._keys.streams[out.to]
                fields = self._fields(stage, out)
                args += [targets.setdefault(key, len(targets) + 2), len(fields), *fields]
        return [
            bool(moved)
            for moved in self._connection.run_script(
                scripts.HOP, [self._keys.streams[stage], *targets], args
            )
        ]

    def _fields(self, stage: StreamName, out: Out) -> list[Any]:
        fields: list[Any] = ["n", out.number, "b", out.payload]
        if out.to == "dead":
            fields += [
                "stage",
                stage,
                "why",
                out.reason,
                "deliveries",
                out.deliveries,
                "worker",
                self._connection.consumer,
            ]
        return fields

    def renew(self, stage: StreamName, ids: Sequence[bytes]) -> int:
        """Renew the leases of entries that are still this worker's; returns how many are."""
        stream = [self._keys.streams[stage]]
        return sum(
            int(
                self._connection.run_script(
                    scripts.RENEW, stream, [GROUP, self._connection.consumer, *some]
                )
            )
            for some in batched(ids, IDS_AT_ONCE)
        )

    def give_back(self, stage: StreamName, ids: Sequence[bytes]) -> int:
        """Hand entries to whoever is next, as if they had never been taken.

        Returns how many were still this worker's. They are parked with the consumer `PARKED` as
        idle for a day, so that the next scan for idle entries finds them at once.
        """
        stream = [self._keys.streams[stage]]
        args = [GROUP, self._connection.consumer, PARKED]
        return sum(
            int(self._connection.run_script(scripts.GIVE_BACK, stream, [*args, *some]))
            for some in batched(ids, IDS_AT_ONCE)
        )

    def retire(self, stage: StreamName) -> bool:
        """Delete this consumer and its heartbeat; returns whether the consumer was deleted.

        It stays while entries are pending with it: Redis would forget that they are.
        """
        return bool(
            self._connection.run_script(
                scripts.RETIRE,
                [self._keys.streams[stage], self._keys.workers],
                [GROUP, self._connection.consumer],
            )
        )

    def forget_dead_consumers(self, stage: StreamName, idle_s: float) -> int:
        """Delete the consumers of dead workers: nothing pending, and not heard of for `idle_s`."""
        keys = [self._keys.streams[stage], self._keys.workers]
        return int(
            self._connection.run_script(
                scripts.FORGET_DEAD_CONSUMERS, keys, [GROUP, round(idle_s * 1000)]
            )
        )


def hop_batches(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """`moves` in batches that one script may move at once."""
    batch: list[Move] = []
    size_bytes = 0
    for move in moves:
        if batch and (len(batch) == HOP_RECORDS or size_bytes + move.size_bytes > HOP_BYTES):
            yield batch
            batch = []
            size_bytes = 0
        batch.append(move)
        size_bytes += move.size_bytes
    if batch:
        yield batch


def _entry(entry_id: bytes, fields: dict[bytes, bytes] | None, deliveries: int) -> Entry:
    """The entry as workers see it. One that was deleted meanwhile has no number and no payload."""
    fields = fields or {}
    number = read_number(fields.get(b"n", b""))
    return Entry(entry_id, number, fields.get(b"b", b""), deliveries)
