"""What everybody may read of a run, and say of itself: policies, readiness, heartbeats, backlogs, dead letters."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from redis.exceptions import ResponseError

from pipeline import scripts
from pipeline.connection import Connection
from pipeline.keys import GROUP, STAGES
from pipeline.records import PolicyVersion, StageName, decode_policy
from pipeline.stage import Stats

PAGE = 500
STARTED = time.time()


class WorkerState(msgspec.Struct, frozen=True):
    """A worker's last heartbeat. `beat` is in seconds since the epoch by the server's clock, `age_s` seconds ago."""

    worker: str
    stage: StageName | Literal["jobs"]
    host: str
    pid: int
    state: str  # "starting", "running" or "draining"
    started: float
    in_hand: int
    done: int
    dead: int
    detail: str
    numbers: dict[str, float]
    age_s: float = 0.0


@dataclass(frozen=True)
class DeadLetter:
    """An entry that was given up: where it was, why, and its bytes."""

    entry_id: bytes
    number: int
    stage: str
    reason: str
    deliveries: int
    worker: str
    payload: bytes


_state = msgspec.json.Decoder(WorkerState)


class Board(Connection):
    """Calls that change nothing but what a worker says of itself."""

    def newest_policy(self) -> PolicyVersion | None:
        """The newest announced policy version.

        Raises:
            RecordError: it was announced by another version of this program.
        """
        payload = self._ask("GET", self.keys.policy)
        return None if payload is None else decode_policy(payload)

    def announcements(self, after_id: bytes = b"0", block_s: float = 0) -> list[tuple[bytes, PolicyVersion]]:
        """Policy versions announced after the entry `after_id`, waiting up to `block_s` for one. For the main thread alone.

        Raises:
            RecordError: one was announced by another version of this program.
        """
        wait = ["BLOCK", max(1, round(block_s * 1000))] if block_s > 0 else []
        reply = self._block("XREAD", *wait, "STREAMS", self.keys.policies, after_id)
        return [(entry_id, decode_policy(fields[b"b"])) for _, entries in reply or [] for entry_id, fields in entries]

    def mark_ready(self, stage: StageName) -> None:
        """Say that a worker of `stage` has been ready once."""
        self._ask("SADD", self.keys.ready, stage)

    def ready(self) -> set[StageName]:
        """The stages that a worker has been ready for."""
        members = {member.decode() for member in self._ask("SMEMBERS", self.keys.ready)}
        return {stage for stage in STAGES if stage in members}

    def finished(self) -> bool:
        """Whether the run has ended."""
        return bool(self._ask("EXISTS", self.keys.finished))

    def heartbeat(self, stage: StageName | Literal["jobs"], stats: Stats, *, state: str = "running", in_hand: int = 0) -> None:
        """Say that this worker lives, what it did and what it waits for."""
        me = WorkerState(
            worker=self.consumer,
            stage=stage,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            started=STARTED,
            in_hand=in_hand,
            done=stats.done,
            dead=stats.dead,
            detail=stats.detail,
            numbers=stats.numbers,
        )
        self._run(scripts.HEARTBEAT, [self.keys.workers], [self.consumer, msgspec.json.encode(me)])

    def workers(self, max_age_s: float = 10.0) -> list[WorkerState]:
        """The workers heard of within `max_age_s`, by stage and name."""
        now = self.server_time()
        states = []
        for beat in self._ask("HGETALL", self.keys.workers).values():
            stamp, _, payload = beat.partition(b" ")
            if (age_s := now - float(stamp)) <= max_age_s:
                states.append(msgspec.structs.replace(_state.decode(payload), age_s=max(0.0, age_s)))
        return sorted(states, key=lambda state: ((*STAGES, "jobs").index(state.stage), state.worker))

    def backlog(self) -> dict[StageName, int]:
        """Entries in each stage's stream, waiting or in hand. The trainer's counts what it trained and did not yet acknowledge."""
        return {stage: int(self._ask("XLEN", self.keys.stream(stage))) for stage in STAGES}

    def pending_counts(self) -> dict[StageName, int]:
        """Entries of each stage's stream that some worker has in hand."""
        return {stage: self._pending_count(stage) for stage in STAGES}

    def _pending_count(self, stage: StageName) -> int:
        try:
            return int(self._ask("XPENDING", self.keys.stream(stage), GROUP)["pending"])
        except ResponseError as error:
            if "NOGROUP" in str(error):
                return 0
            raise

    def numbers(self, stage: StageName) -> list[int]:
        """The numbers of all entries in the stream of `stage`, in order."""
        return list(self._numbers(self.keys.stream(stage)))

    def dead_numbers(self) -> list[int]:
        """The numbers of all dead letters still in Redis, in order."""
        return list(self._numbers(self.keys.dead))

    def _numbers(self, stream: str) -> Iterator[int]:
        start = "-"
        while True:
            last, numbers = self._run(scripts.NUMBERS, [stream], [start, PAGE])
            yield from map(int, numbers)
            if not last:
                return
            start = f"({last.decode()}"

    def dead_count(self) -> int:
        """Dead letters in Redis."""
        return int(self._ask("XLEN", self.keys.dead))

    def dead_letters(self, count: int = 100, after: bytes | None = None) -> list[DeadLetter]:
        """The oldest `count` dead letters, or the oldest after the entry `after`."""
        start = "-" if after is None else b"(" + after
        return [_letter(entry_id, fields) for entry_id, fields in self._ask("XRANGE", self.keys.dead, start, "+", "COUNT", count)]

    def drop_dead(self, ids: Sequence[bytes]) -> None:
        """Delete dead letters that were written elsewhere."""
        if ids:
            self._ask("XDEL", self.keys.dead, *ids)


def _letter(entry_id: bytes, fields: dict[bytes, Any]) -> DeadLetter:
    words = {name: fields.get(name, b"").decode(errors="replace") for name in (b"n", b"stage", b"why", b"deliveries", b"worker")}
    return DeadLetter(
        entry_id=entry_id,
        number=int(words[b"n"] or 0),
        stage=words[b"stage"],
        reason=words[b"why"],
        deliveries=int(words[b"deliveries"] or 0),
        worker=words[b"worker"],
        payload=fields.get(b"b", b""),
    )
