"""A pool of scoring children: each rollout is scored in a process that can be killed, within a time
limit of its own.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from onstream.pipeline.errors import UserError
from onstream.pipeline.undecodable import UNDECODABLE
from onstream.settings.orchestrator import OrchestratorSettings
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import (
    PACKET_BYTES,
    Frames,
    Kill,
    Ready,
    ScorerExited,
    ScorerNotLoaded,
    ScoringRequest,
    Spawn,
    Start,
    Verdict,
    WireError,
    framed,
)

MAX_BATCH = 64
# work sent to one child at once: a rollout waits no longer than this behind its neighbours, if all
# go well
BATCH_S = 0.02
IN_HAND_S = 0.5  # work that the pool wants to hold
MAX_VERDICT_BYTES = 1 << 20
MAX_FAILED_STARTS = 5
START_S = 120.0

TIMED_OUT = Verdict(0.0, {"timed_out": 1.0})
CRASHED = Verdict(0.0, {"crashed": 1.0})

_encode = msgspec.msgpack.Encoder().encode
_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode


@dataclass
class QueuedRequest:
    """A job and whose it is. `crashes` counts the children that died of it."""

    key: int
    job: ScoringRequest
    crashes: int = 0


@dataclass
class ScorerProcess:
    """One slot of the pool, and the process that is in it now."""

    slot: int
    connection: socket.socket
    frames: Frames = field(default_factory=lambda: Frames(MAX_VERDICT_BYTES))
    jobs: deque[QueuedRequest] = field(
        default_factory=deque
    )  # sent and not yet answered; it is working on the first
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    since: float = 0.0  # when it began with its first job, by the monotonic clock
    up: bool = False
    leaving: bool = False  # dead, or about to be: it gets no more jobs
    excused: bool = False  # its end is not the fault of the job it was working on

    @property
    def idle(self) -> bool:
        """Whether it can be given jobs."""
        return self.up and not self.jobs and not self.leaving


class ScorerPool:
    """Scores completions in `orchestrator.verification.processes` children.

    A completion that runs past `verification.timeout` scores 0 (part `timed_out`), and its child is
    killed. One whose child dies is tried once more in a fresh child, since somebody else may have
    killed the first; if that dies too, it scores 0 (part `crashed`).
    """

    def __init__(
        self, settings: Settings, *, timeout_s: float | None = None, processes: int | None = None
    ) -> None:
        """`timeout_s` and `processes` stand in for the settings' own."""
        verification = settings.orchestrator.verification
        self._timeout_s = timeout_s or verification.timeout
        self._processes = processes or verification.processes
        # The nursery loads the scorer alone, and gets no secrets to do so.
        scorer = Settings(
            task=settings.task, orchestrator=OrchestratorSettings(verification=verification)
        )
        sections = scorer.model_dump_json(
            include={"task": True, "orchestrator": {"verification"}}
        ).encode()
        self._start = Start(sections, verification.max_memory << 20)
        self._children: dict[int, ScorerProcess] = {}
        self._waiting: deque[QueuedRequest] = deque()
        self._verdicts: list[tuple[int, Verdict]] = []
        self._in_hand = 0
        self._failed_starts = 0
        self._mean_s = BATCH_S  # of one rollout, lately; the first batches are of one

    def start(self) -> None:
        """Start the nursery and the children.

        Raises:
            UserError: the scorer cannot be loaded.
        """
        self._selector = selectors.DefaultSelector()
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            # -P and our own path: the working directory is not searched before what this process
            # imported
            command = [
                sys.executable,
                "-P",
                "-m",
                "onstream.workers.verifier.fork_server",
                str(other.fileno()),
            ]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            }
            self._nursery = subprocess.Popen(
                command,
                pass_fds=[other.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the verifier's to act on
            )
        self._control.send(msgspec.msgpack.encode(self._start))
        self._await_scorer()
        self._selector.register(self._control, selectors.EVENT_READ, None)
        for slot in range(self._processes):
            self._spawn(slot)

    @property
    def in_hand(self) -> int:
        """Rollouts submitted and not yet collected."""
        return self._in_hand

    @property
    def room(self) -> int:
        """How many more rollouts keep the children busy: more of them the faster they go."""
        each = max(2, min(4 * MAX_BATCH, int(IN_HAND_S / self._mean_s)))
        return max(0, each * self._processes - self._in_hand)

    def submit(self, key: int, completion: str, info: dict[str, Any]) -> None:
        """Queue a completion for scoring; `collect` gives its verdict under `key`."""
        self._in_hand += 1
        self._waiting.append(QueuedRequest(key, ScoringRequest(completion, info)))

    def collect(self, wait_s: float) -> list[tuple[int, Verdict]]:
        """The verdicts reached within `wait_s`, or sooner if all are.

        Raises:
            RuntimeError: the nursery is gone, or no child of it comes up.
        """
        end = time.monotonic() + wait_s
        while len(self._verdicts) < self._in_hand:
            self._dispatch()
            now = time.monotonic()
            for key, events in self._selector.select(
                max(0.0, min((end, *self._deadlines())) - now)
            ):
                self._attend(key.data, events)
            self._kill_late()
            if time.monotonic() >= end:
                break
        verdicts = self._verdicts
        self._verdicts = []
        self._in_hand -= len(verdicts)
        return verdicts

    def close(self) -> None:
        """Kill all children. Nothing in hand is scored any more."""
        self._control.close()  # the nursery ends of it, and ends its children
        for child in self._children.values():
            child.connection.close()
        self._selector.close()
        try:
            self._nursery.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()

    def _await_scorer(self) -> None:
        self._control.settimeout(START_S)
        try:
            reply = self._control.recv(PACKET_BYTES)
        except ConnectionResetError:
            reply = b""
        except TimeoutError:
            reply = _encode(
                ScorerNotLoaded(
                    f"the scorer was not imported in {START_S:.0f} s",
                    "a quick import",
                    "Look at its module's top level.",
                )
            )
        self._control.settimeout(None)
        if not reply:
            reply = _encode(
                ScorerNotLoaded(
                    "the scorer's process ended while importing it",
                    "an importable scorer",
                    "See the lines above.",
                )
            )
        message = msgspec.msgpack.decode(reply, type=Ready | ScorerNotLoaded)
        if isinstance(message, ScorerNotLoaded):
            self.close()
            raise UserError(message.got, expected=message.expected, next_step=message.next_step)

    def _spawn(self, slot: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [_encode(Spawn(slot))], [theirs.fileno()])
        ours.setblocking(False)
        self._children[slot] = child = ScorerProcess(slot, ours)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _dispatch(self) -> None:
        """Give each idle child its share of what is waiting."""
        for child in self._children.values():
            if not self._waiting:
                return
            if child.idle:
                share = -(-len(self._waiting) // self._processes)
                count = max(1, min(MAX_BATCH, share, int(BATCH_S / self._mean_s)))
                child.jobs.extend(
                    self._waiting.popleft() for _ in range(min(count, len(self._waiting)))
                )
                child.unsent = memoryview(framed(_encode([waiting.job for waiting in child.jobs])))
                child.since = time.monotonic()
                self._send(child)

    def _send(self, child: ScorerProcess) -> None:
        """Send what the socket takes: a child that does not read must not hold up the verifier."""
        try:
            child.unsent = child.unsent[child.connection.send(child.unsent) :]
        except BlockingIOError:
            pass  # the rest goes when the selector says so
        except (BrokenPipeError, ConnectionResetError):
            child.unsent = memoryview(b"")  # it has died, as the nursery will tell
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.unsent else 0)
        self._selector.modify(child.connection, events, child)

    def _attend(self, child: ScorerProcess | None, events: int) -> None:
        if child is None:
            self._hear_nursery()
        elif not child.leaving:  # it may have been found dead earlier in this same round
            if events & selectors.EVENT_WRITE:
                self._send(child)
            if events & selectors.EVENT_READ:
                self._read(child)

    def _read(self, child: ScorerProcess) -> None:
        """Take the verdicts that have come."""
        try:
            while data := child.connection.recv(1 << 18):
                for frame in child.frames.feed(data):
                    self._settle(child, frame)
        except BlockingIOError:
            return
        except (ConnectionResetError, WireError, *UNDECODABLE):
            # a child that died, or one whose socket somebody else wrote to: nothing that follows is
            # to be trusted
            pass
        self._dismiss(child)

    def _settle(self, child: ScorerProcess, frame: bytes) -> None:
        if not frame and not child.up:
            child.up = True
            self._failed_starts = 0
        elif not child.jobs:
            raise WireError("a verdict without a job")
        else:
            verdict = _decode_verdict(frame)
            self._finish_first(child, verdict)
            if verdict.retires:
                self._dismiss(child, excused=True)

    def _finish_first(self, child: ScorerProcess, verdict: Verdict) -> None:
        """Settle the child's first job, note how long it took, and begin to count for its next one."""
        now = time.monotonic()
        self._verdicts.append((child.jobs.popleft().key, verdict))
        self._mean_s += 0.05 * (now - child.since - self._mean_s)
        child.since = now

    def _deadlines(self) -> Iterator[float]:
        return (
            child.since + self._timeout_s
            for child in self._children.values()
            if child.jobs and not child.leaving
        )

    def _kill_late(self) -> None:
        """Kill the children whose job is past its time. What they said while we were busy elsewhere
        is read first.
        """
        for child in self._children.values():
            if self._is_late(child):
                self._read(child)
            if self._is_late(child):
                self._finish_first(child, TIMED_OUT)
                self._dismiss(child, excused=True)

    def _is_late(self, child: ScorerProcess) -> bool:
        return (
            bool(child.jobs)
            and not child.leaving
            and time.monotonic() >= child.since + self._timeout_s
        )

    def _dismiss(self, child: ScorerProcess, *, excused: bool = False) -> None:
        """See to it that the child ends. It may be dead already, or only have closed its socket."""
        if not child.leaving:
            child.leaving = True
            child.excused = excused
            self._selector.unregister(child.connection)
            self._control.send(_encode(Kill(child.slot)))

    def _hear_nursery(self) -> None:
        packet = self._control.recv(PACKET_BYTES)
        if not packet:
            raise RuntimeError(
                f"the process that scoring children are forked from has ended, with status {self._nursery.wait()}"
            )
        exited = msgspec.msgpack.decode(packet, type=ScorerExited)
        self._bury(self._children[exited.slot], exited.status)

    def _bury(self, child: ScorerProcess, status: int) -> None:
        """Settle what a dead child had in hand, and put another in its place."""
        self._read(child)  # its last words
        self._dismiss(child)
        child.connection.close()
        if not child.up:
            self._count_failed_start(status)
        elif child.jobs and not child.excused:
            child.jobs[0].crashes += 1
            if child.jobs[0].crashes > 1:
                self._finish_first(child, CRASHED)
        self._waiting.extendleft(reversed(child.jobs))
        self._spawn(child.slot)

    def _count_failed_start(self, status: int) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} scoring children in a row ended as they started, the last with status {status}"
            )
