"""A pool of scorer processes.

Each completion is scored in a process that can be killed, within a time limit of its own.
"""

from __future__ import annotations

import math
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from onstream.settings.decoding import UNDECODABLE
from onstream.settings.root import Settings
from onstream.settings.sections.orchestrator import OrchestratorSettings, VerificationSettings
from onstream.workers.verifier.fork_server_client import ForkServerClient
from onstream.workers.verifier.scorer_messages import (
    LENGTH,
    ScorerExited,
    ScoringRequest,
    Start,
    Verdict,
)

if TYPE_CHECKING:
    # Its import brings numpy, and the scorer is tried before anything may be slow.
    from onstream.pipeline.records import Rollout

MAX_BATCH = 64
BATCH_S = 0.02
"""Work sent to one process at once. A completion waits about so long behind its neighbours, if none
of them is slow.
"""
IN_HAND_S = 0.5
"""Work that the pool wants to hold."""
MAX_VERDICT_BYTES = 1 << 20
MAX_FAILED_STARTS = 5
MEAN_WEIGHT = 0.05
"""The weight of the newest duration in the running mean."""

TIMED_OUT = Verdict(0.0, {"timed_out": 1.0})
CRASHED = Verdict(0.0, {"crashed": 1.0})

_encode = msgspec.msgpack.Encoder().encode
_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode


class FrameError(ValueError):
    """Bytes from a scorer process that are no frame or no verdict."""


class Frames:
    """Cuts the bytes of a stream into frames."""

    def __init__(self, max_bytes: int) -> None:
        """A frame of more than `max_bytes` is an error."""
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete with `data`.

        Raises:
            FrameError: a frame is too long.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise FrameError(f"a frame of {length} bytes; expected at most {self._max_bytes}")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield frame


@dataclass
class QueuedRequest:
    """A request and its key. `crashes` counts the processes that died of it."""

    key: int
    request: ScoringRequest
    crashes: int = 0


@dataclass
class ScorerProcess:
    """One slot of the pool, and the process that is in it now."""

    slot: int
    connection: socket.socket
    frames: Frames = field(default_factory=lambda: Frames(MAX_VERDICT_BYTES))
    requests: deque[QueuedRequest] = field(default_factory=deque)
    """Sent and not yet answered. The process works on the first."""
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    since: float = 0.0
    """When it began with its first request, by the monotonic clock."""
    ready: bool = False
    ending: bool = False
    """Dead, or about to be: it gets no more requests."""
    excused: bool = False
    """Its first request is not the cause of its end."""

    @property
    def idle(self) -> bool:
        """Whether it can be given requests."""
        return self.ready and not self.requests and not self.ending


class ScorerPool:
    """Scores completions in `orchestrator.verification.processes` processes.

    A completion that runs past `verification.timeout` scores 0 (part `timed_out`), and its process
    is killed. One whose process dies is tried once more in a fresh one, since somebody else may
    have killed the first. If that dies too, the completion scores 0 (part `crashed`).
    """

    def __init__(
        self, settings: Settings, *, timeout_s: float | None = None, processes: int | None = None
    ) -> None:
        """`timeout_s` and `processes` stand in for the settings' own."""
        verification = settings.orchestrator.verification
        self._settings = settings
        self._timeout_s = timeout_s or verification.timeout
        self._processes = processes or verification.processes
        self._slots: dict[int, ScorerProcess] = {}
        self._queue: deque[QueuedRequest] = deque()
        self._verdicts: list[tuple[int, Verdict]] = []
        self._in_hand = 0
        self._failed_starts = 0
        self._mean_s = BATCH_S  # of one completion, lately; the first batches hold one each

    def start(self) -> None:
        """Start the fork server and the processes.

        Raises:
            UserError: the scorer cannot be loaded.
        """
        self._fork_server = ForkServerClient(_start_message(self._settings))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._fork_server, selectors.EVENT_READ, None)
        for slot in range(self._processes):
            self._spawn(slot)

    @property
    def in_hand(self) -> int:
        """Completions submitted and not yet collected."""
        return self._in_hand

    @property
    def room(self) -> int:
        """How many more completions keep the processes busy: the faster they go, the more."""
        each = max(2, min(4 * MAX_BATCH, int(IN_HAND_S / self._mean_s)))
        return max(0, each * self._processes - self._in_hand)

    def submit(self, key: int, completion: str, info: dict[str, Any]) -> None:
        """Queue a completion for scoring; `collect` gives its verdict under `key`."""
        self._in_hand += 1
        self._queue.append(QueuedRequest(key, ScoringRequest(completion, info)))

    def collect(self, wait_s: float) -> list[tuple[int, Verdict]]:
        """The verdicts reached within `wait_s`; sooner when there is one for all that is in hand.

        Raises:
            RuntimeError: the fork server has ended, or none of its processes becomes ready.
        """
        end = time.monotonic() + wait_s
        while len(self._verdicts) < self._in_hand:
            self._dispatch()
            pause_s = min((end, *self._deadlines())) - time.monotonic()
            for key, events in self._selector.select(max(0.0, pause_s)):
                self._handle_event(key.data, events)
            self._kill_late()
            if time.monotonic() >= end:
                break
        verdicts = self._verdicts
        self._verdicts = []
        self._in_hand -= len(verdicts)
        return verdicts

    def close(self) -> None:
        """Kill all processes. Nothing in hand is scored any more."""
        for process in self._slots.values():
            process.connection.close()
        self._selector.close()
        self._fork_server.close()

    def _spawn(self, slot: int) -> None:
        process = ScorerProcess(slot, self._fork_server.spawn(slot))
        self._slots[slot] = process
        self._selector.register(process.connection, selectors.EVENT_READ, process)

    def _dispatch(self) -> None:
        """Give each idle process its share of the queue."""
        for process in self._slots.values():
            if not self._queue:
                return
            if process.idle:
                count = self._batch_size()
                batch = [self._queue.popleft() for _ in range(count)]
                process.requests.extend(batch)
                body = _encode([queued.request for queued in batch])
                process.unsent = memoryview(LENGTH.pack(len(body)) + body)
                process.since = time.monotonic()
                self._send(process)

    def _batch_size(self) -> int:
        """How many requests one process is given: an equal share, of `BATCH_S` of work at most."""
        share = -(-len(self._queue) // self._processes)
        return max(1, min(MAX_BATCH, share, int(BATCH_S / self._mean_s)))

    def _send(self, process: ScorerProcess) -> None:
        """Send what the socket takes: a process that does not read must not hold us up."""
        try:
            sent = process.connection.send(process.unsent)
            process.unsent = process.unsent[sent:]
        except BlockingIOError:
            pass  # the rest goes when the selector says so
        except (BrokenPipeError, ConnectionResetError):
            process.unsent = memoryview(b"")  # it has died; the fork server will tell
        events = selectors.EVENT_READ
        if process.unsent:
            events |= selectors.EVENT_WRITE
        self._selector.modify(process.connection, events, process)

    def _handle_event(self, process: ScorerProcess | None, events: int) -> None:
        if process is None:
            self._replace(self._fork_server.next_exit())
        elif not process.ending:  # it may have been found dead earlier in this same round
            if events & selectors.EVENT_WRITE:
                self._send(process)
            if events & selectors.EVENT_READ:
                self._read(process)

    def _read(self, process: ScorerProcess) -> None:
        """Take the verdicts that have come."""
        try:
            while data := process.connection.recv(1 << 18):
                for frame in process.frames.feed(data):
                    self._take_frame(process, frame)
        except BlockingIOError:
            return
        except (ConnectionResetError, FrameError, *UNDECODABLE):
            # It died, or the scorer wrote to its socket. Nothing that follows can be trusted.
            pass
        self._end(process)

    def _take_frame(self, process: ScorerProcess, frame: bytes) -> None:
        if not frame and not process.ready:
            process.ready = True
            self._failed_starts = 0
        elif not process.requests:
            raise FrameError("a verdict without a request")
        else:
            verdict = _decode_verdict(frame)
            self._finish_first(process, verdict)
            if verdict.retires:
                self._end(process, excused=True)

    def _finish_first(self, process: ScorerProcess, verdict: Verdict) -> None:
        """Note the verdict on the process's first request, and restart the clock for the next."""
        now = time.monotonic()
        self._verdicts.append((process.requests.popleft().key, verdict))
        self._mean_s += MEAN_WEIGHT * (now - process.since - self._mean_s)
        process.since = now

    def _deadlines(self) -> Iterator[float]:
        for process in self._slots.values():
            if process.requests and not process.ending:
                yield process.since + self._timeout_s

    def _kill_late(self) -> None:
        """Kill the processes whose request is past its time."""
        for process in self._slots.values():
            if self._is_late(process):
                # A verdict may have come while this process was busy elsewhere: it counts.
                self._read(process)
            if self._is_late(process):
                self._finish_first(process, TIMED_OUT)
                self._end(process, excused=True)

    def _is_late(self, process: ScorerProcess) -> bool:
        if not process.requests or process.ending:
            return False
        return time.monotonic() >= process.since + self._timeout_s

    def _end(self, process: ScorerProcess, *, excused: bool = False) -> None:
        """Have the process killed. It may be dead already, or have closed its socket only."""
        if not process.ending:
            process.ending = True
            process.excused = excused
            self._selector.unregister(process.connection)
            self._fork_server.kill(process.slot)

    def _replace(self, exited: ScorerExited) -> None:
        """Queue again what a dead process had in hand, and put another process in its place."""
        process = self._slots[exited.slot]
        self._read(process)  # what it wrote before its end
        self._end(process)
        process.connection.close()
        if not process.ready:
            self._count_failed_start(exited.status)
        elif process.requests and not process.excused:
            process.requests[0].crashes += 1
            if process.requests[0].crashes > 1:
                self._finish_first(process, CRASHED)
        self._queue.extendleft(reversed(process.requests))
        self._spawn(process.slot)

    def _count_failed_start(self, status: int) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} scorer processes in a row ended as they started, "
                f"the last with status {status}"
            )


def final_answer(rollout: Rollout) -> str:
    """What the scorer gets: the text of the last sample, which comes after all tool calls."""
    return rollout.samples[-1].completion_text


def within_bounds(verdict: Verdict, verification: VerificationSettings) -> Verdict:
    """`verdict`, unscored where its reward is out of bounds; without parts that are not finite.

    One absurd reward would take a whole batch's gradient with it.
    """
    parts = {name: part for name, part in verdict.parts.items() if math.isfinite(part)}
    least = verification.min_reward
    most = verification.max_reward
    reward = verdict.reward
    if reward is None or least <= reward <= most:
        return msgspec.structs.replace(verdict, parts=parts)
    reason = (
        f"the scorer gave the reward {reward:g}; expected {least:g} to {most:g} "
        "(orchestrator.verification.min_reward and max_reward)"
    )
    return msgspec.structs.replace(verdict, reward=None, parts=parts, unscored=reason)


def write_verdict(rollout: Rollout, verdict: Verdict) -> None:
    """Write `verdict` into `rollout`."""
    rollout.reward = verdict.reward
    rollout.reward_parts = verdict.parts
    rollout.unscored = verdict.unscored


def _start_message(settings: Settings) -> Start:
    """What the fork server is told: the settings that the scorer needs, and no secrets."""
    verification = settings.orchestrator.verification
    scorer_settings = Settings(
        task=settings.task, orchestrator=OrchestratorSettings(verification=verification)
    )
    sections = scorer_settings.model_dump_json(
        include={"task": True, "orchestrator": {"verification"}}
    )
    return Start(sections.encode(), verification.max_memory << 20)
