"""What everybody may read of a run: policies, readiness, heartbeats, backlogs, dead letters."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from redis.exceptions import ResponseError

from onstream.pipeline import telemetry
from onstream.pipeline.record_codec import RecordError, decode_policy, read_number
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.keys import GROUP
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.stages import EPISODE_STAGES, FIRST, StreamName, streams_of

if TYPE_CHECKING:
    from onstream.pipeline.stage import Stats

PAGE = 500
LOOKS = 4
"""How often streams between which records go back and forth are read, so that none is missed."""
STARTED = time.time()
VERSION = version("onstream")
FAILED = "failed"
ALIVE_S = 10.0
FORGOTTEN_S = 3600.0


class WorkerState(msgspec.Struct, frozen=True):
    """A worker's last heartbeat, `age_s` seconds ago.

    `error` is the last error in its log, `error_time` when that was. Times are in seconds since the
    epoch.
    """

    worker: str
    stage: StreamName  # or "jobs"
    host: str
    pid: int
    state: str  # "starting", "running", "draining" or, in its last heartbeat, "failed"
    started: float
    in_hand: int
    done: int
    dead: int
    detail: str
    numbers: dict[str, float]
    version: str = ""  # of Onstream
    error: str = ""
    error_time: float = 0.0
    age_s: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it was heard of lately, and not for the last time."""
        return self.age_s <= ALIVE_S and self.state != FAILED


class PlannedRoute(msgspec.Struct, frozen=True):
    """What is read here of a run's plan."""

    route: tuple[str, ...]
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PendingSummary:
    """The entries of one stage's stream that workers have in hand.

    `oldest_s` is how long ago the oldest of them was written.
    """

    count: int = 0
    oldest_s: float | None = None
    by_worker: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DeadLetter:
    """An entry that was given up: where it was, why, and its payload."""

    entry_id: bytes
    number: int
    stage: str
    reason: str
    deliveries: int
    worker: str
    payload: bytes

    @property
    def time(self) -> float:
        """When it was written, in seconds since the epoch by the server's clock."""
        return float(self.entry_id.partition(b"-")[0]) / 1000


_state = msgspec.json.Decoder(WorkerState)
_planned = msgspec.json.Decoder(PlannedRoute)
log = structlog.get_logger(__name__)


class RunState:
    """What anybody may read of a run, and what each worker writes about itself."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = connection.keys

    def newest_policy(self) -> PolicyVersion | None:
        """The newest announced policy version.

        Where the key holds something else, written by hand say, it is the last announcement; None
        where there is none either. The trainer mends the key with `Publisher.mend`.
        """
        try:
            return self.policy_in_key()
        except RecordError as error:
            _warn_of_policy(self._keys.policy, str(error))
        return next(self._announced_backwards(), None)

    def policy_in_key(self) -> PolicyVersion | None:
        """The policy version in the key of the newest; None where there is no key.

        Raises:
            RecordError: it holds something else.
        """
        payload = self._connection.ask("GET", self._keys.policy)
        return None if payload is None else decode_policy(payload)

    def announced_policies(self) -> list[PolicyVersion]:
        """Every policy version that was announced, in order; without entries that are none."""
        return list(self._announced_backwards())[::-1]

    def _announced_backwards(self) -> Iterator[PolicyVersion]:
        for _, fields in self._connection.ask("XREVRANGE", self._keys.policies, "+", "-"):
            try:
                yield decode_policy(fields.get(b"b", b""))
            except RecordError as error:
                _warn_of_policy(self._keys.policies, str(error))

    def mark_ready(self, stage: StreamName) -> None:
        """Note that a worker of `stage`, or of a teacher by name, has been ready once."""
        self._connection.run_script(scripts.MARK_READY, [self._keys.ready], [stage])

    def ready_stages(self) -> set[StreamName]:
        """The stages, and teachers by name, that a worker has been ready for."""
        members = {member.decode() for member in self._connection.ask("SMEMBERS", self._keys.ready)}
        return {stream for stream in self._keys.streams if stream in members}

    def issued(self) -> int:
        """How many tickets were ever issued; the number of the last one."""
        return read_number(self._connection.ask("GET", self._keys.issued) or b"")

    def plan(self) -> bytes | None:
        """The run's plan, once a trainer has written it."""
        plan: bytes | None = self._connection.ask("GET", self._keys.plan)
        return plan

    def path(self) -> tuple[StreamName, ...]:
        """The streams that rollouts pass by the run's plan, the first included.

        Empty where Redis has no plan, or something else in its place.
        """
        try:
            planned = _planned.decode(self.plan() or b"")
        except UNDECODABLE:
            return ()
        return streams_of((FIRST, *planned.route), planned.teachers)

    def teachers(self) -> tuple[str, ...]:
        """The teachers that score by the run's plan, where there are any by name."""
        try:
            return _planned.decode(self.plan() or b"").teachers
        except UNDECODABLE:
            return ()

    def finished(self) -> bool:
        """Whether the run has ended; see `RunEnd` for one that may be given more steps."""
        return self.finished_by() is not None

    def finished_by(self) -> int | None:
        """The epoch of the trainer that ended the run; None where it has not ended."""
        epoch = self._connection.ask("GET", self._keys.finished)
        return None if epoch is None else int(epoch)

    def write_heartbeat(
        self,
        stage: StreamName,
        stats: Stats,
        *,
        state: str = "running",
        in_hand: int = 0,
    ) -> None:
        """Write that this worker lives, what it did and waits for, and what went wrong last."""
        error = telemetry.last_error()
        me = WorkerState(
            worker=self._connection.consumer,
            stage=stage,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            started=STARTED,
            in_hand=in_hand,
            done=stats.done,
            dead=stats.dead,
            detail=stats.detail,
            numbers=dict(stats.numbers),
            version=VERSION,
            error=error.text if error else "",
            error_time=error.time if error else 0.0,
        )
        ready = stage if stage in self._keys.streams and state != "starting" else ""
        self._connection.run_script(
            scripts.HEARTBEAT,
            [self._keys.workers, self._keys.ready],
            [self._connection.consumer, msgspec.json.encode(me), ready],
        )

    def remove_heartbeat(self) -> None:
        """Delete this worker's heartbeat. `Streams.retire` does so too, for a worker of a stage."""
        self._connection.ask("HDEL", self._keys.workers, self._connection.consumer)

    def workers(self, max_age_s: float = ALIVE_S) -> list[WorkerState]:
        """The workers that wrote a heartbeat within `max_age_s` and have not failed, sorted."""
        return [state for state in self.last_heartbeats(max_age_s) if state.state != FAILED]

    def last_heartbeats(self, max_age_s: float = FORGOTTEN_S) -> list[WorkerState]:
        """The last heartbeats within `max_age_s`, dead workers' too, sorted by stage and name."""
        now = self._connection.server_time()
        states = []
        for beat in self._connection.ask("HGETALL", self._keys.workers).values():
            stamp, _, payload = beat.partition(b" ")
            if (age_s := now - float(stamp)) <= max_age_s:
                states.append(
                    msgspec.structs.replace(_state.decode(payload), age_s=max(0.0, age_s))
                )
        places = {stream: place for place, stream in enumerate(self._keys.streams)}
        last = len(places)
        return sorted(states, key=lambda state: (places.get(state.stage, last), state.worker))

    def backlog(self) -> dict[StreamName, int]:
        """How many entries each stage's stream holds, waiting or in hand.

        The trainer's also holds what it has trained on and not yet acknowledged.
        """
        return {
            name: int(self._connection.ask("XLEN", key)) for name, key in self._keys.streams.items()
        }

    def pending_counts(self) -> dict[StreamName, int]:
        """How many entries of each stage's stream some worker has in hand."""
        return {stream: self._pending_count(stream) for stream in self._keys.streams}

    def _pending_count(self, stage: StreamName) -> int:
        return int(self._xpending(stage).get("pending", 0))

    def pending_summary(self, stage: StreamName) -> PendingSummary:
        """What workers have in hand of the stream of `stage`, and which workers have it."""
        summary = self._xpending(stage)
        if not summary.get("pending"):
            return PendingSummary()
        written = float(summary["min"].partition(b"-")[0]) / 1000
        by_worker = {
            consumer["name"].decode(): int(consumer["pending"]) for consumer in summary["consumers"]
        }
        return PendingSummary(
            int(summary["pending"]), max(0.0, self._connection.server_time() - written), by_worker
        )

    def _xpending(self, stage: StreamName) -> dict[str, Any]:
        try:
            summary: dict[str, Any] = self._connection.ask(
                "XPENDING", self._keys.streams[stage], GROUP
            )
        except ResponseError as error:
            if "NOGROUP" in str(error):
                return {}
            raise
        return summary

    def numbers(self, stage: StreamName) -> list[int]:
        """The numbers of all entries of the stream of `stage`, in order; 0 where one names none."""
        return list(self._numbers(self._keys.streams[stage]))

    def numbers_of_episodes(self) -> set[int]:
        """The numbers of the episodes on their way between environment and student.

        They go back and forth between two streams. One is missed only where it has moved between
        each two of several looks. Empty where the run has no environment.
        """
        if "act" not in self.path():
            return set()
        looks = (*EPISODE_STAGES,) * LOOKS
        return {number for stage in looks for number in self.numbers(stage)}

    def dead_numbers(self) -> list[int]:
        """The numbers of all dead letters still in Redis, in order; 0 for one that names none."""
        return list(self._numbers(self._keys.dead))

    def _numbers(self, stream: str) -> Iterator[int]:
        start = "-"
        while True:
            last, numbers = self._connection.run_script(scripts.NUMBERS, [stream], [start, PAGE])
            yield from map(read_number, numbers)
            if not last:
                return
            start = f"({last.decode()}"

    def dead_count(self) -> int:
        """Dead letters in Redis."""
        return int(self._connection.ask("XLEN", self._keys.dead))

    def dead_letters(self, count: int = 100, after: bytes | None = None) -> list[DeadLetter]:
        """The oldest `count` dead letters, or the oldest after the entry `after`."""
        start = "-" if after is None else b"(" + after
        return [
            _letter(entry_id, fields)
            for entry_id, fields in self._connection.ask(
                "XRANGE", self._keys.dead, start, "+", "COUNT", count
            )
        ]

    def newest_dead_letter(self) -> DeadLetter | None:
        """The dead letter written last, where there is one."""
        rows = self._connection.ask("XREVRANGE", self._keys.dead, "+", "-", "COUNT", 1)
        return _letter(*rows[0]) if rows else None

    def delete_dead_letters(self, ids: Sequence[bytes]) -> None:
        """Delete dead letters, which the caller has written to a file."""
        if ids:
            self._connection.ask("XDEL", self._keys.dead, *ids)


def _warn_of_policy(key: str, problem: str) -> None:
    log.warning("no policy version; passed over", key=key, problem=problem)


def _letter(entry_id: bytes, fields: dict[bytes, Any]) -> DeadLetter:
    words = {
        name: fields.get(name, b"").decode(errors="replace")
        for name in (b"stage", b"why", b"worker")
    }
    return DeadLetter(
        entry_id=entry_id,
        number=read_number(fields.get(b"n", b"")),
        stage=words[b"stage"],
        reason=words[b"why"],
        deliveries=read_number(fields.get(b"deliveries", b"")),
        worker=words[b"worker"],
        payload=fields.get(b"b", b""),
    )
