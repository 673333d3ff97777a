"""A pool of child processes: what the user's own code does, where it can be killed.

Each request is answered in a child, within a time limit of its own.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from onstream.pipeline.child_processes.fork_server_client import ForkServerClient
from onstream.pipeline.child_processes.frames import FrameError, Frames
from onstream.pipeline.child_processes.messages import LENGTH, ChildExited, Reply, Start
from onstream.settings.decoding import UNDECODABLE

MAX_BATCH = 64
BATCH_S = 0.02
"""Work sent to one process at once. A request waits about so long behind its neighbours, if none of
them is slow.
"""
IN_HAND_S = 0.5
"""Work that the pool wants to hold."""
MAX_REPLY_BYTES = 1 << 20
MAX_FAILED_STARTS = 5
MEAN_WEIGHT = 0.05
"""The weight of the newest duration in the running mean."""

_encode = msgspec.msgpack.Encoder().encode

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
ReplyT = TypeVar("ReplyT", bound=Reply)


@dataclass
class QueuedRequest(Generic[RequestT]):
    """A request and its key. `crashes` counts the processes that died of it."""

    key: int
    request: RequestT
    crashes: int = 0


@dataclass
class PoolChild(Generic[RequestT]):
    """One slot of the pool, and the process that is in it now."""

    slot: int
    connection: socket.socket
    frames: Frames = field(default_factory=lambda: Frames(MAX_REPLY_BYTES))
    requests: deque[QueuedRequest[RequestT]] = field(default_factory=deque)
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


class ChildPool(Generic[RequestT, ReplyT]):
    """Has requests answered by `processes` children.

    A request that runs past `timeout_s` gets the reply `timed_out`, and its process is killed. One
    whose process dies is tried once more in a fresh one, since somebody else may have killed the
    first. If that dies too, the reply is `crashed`.
    """

    def __init__(
        self,
        start: Start,
        *,
        reply_type: type[ReplyT],
        timed_out: ReplyT,
        crashed: ReplyT,
        timeout_s: float,
        processes: int,
    ) -> None:
        """`start` is what the fork server is told."""
        self._start_message = start
        self._decode_reply = msgspec.msgpack.Decoder(reply_type).decode
        self._timed_out = timed_out
        self._crashed = crashed
        self._timeout_s = timeout_s
        self._processes = processes
        self._slots: dict[int, PoolChild[RequestT]] = {}
        self._queue: deque[QueuedRequest[RequestT]] = deque()
        self._replies: list[tuple[int, ReplyT]] = []
        self._in_hand = 0
        self._failed_starts = 0
        self._mean_s = BATCH_S  # of one request, lately; the first batches hold one each

    def start(self) -> None:
        """Start the fork server and the processes.

        Raises:
            UserError: the work cannot be loaded.
        """
        self._fork_server = ForkServerClient(self._start_message)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._fork_server, selectors.EVENT_READ, None)
        for slot in range(self._processes):
            self._spawn(slot)

    @property
    def in_hand(self) -> int:
        """Requests submitted and not yet collected."""
        return self._in_hand

    @property
    def room(self) -> int:
        """How many more requests keep the processes busy: the faster they go, the more."""
        each = max(2, min(4 * MAX_BATCH, int(IN_HAND_S / self._mean_s)))
        return max(0, each * self._processes - self._in_hand)

    def submit(self, key: int, request: RequestT) -> None:
        """Queue `request`; `collect` gives the reply to it under `key`."""
        self._in_hand += 1
        self._queue.append(QueuedRequest(key, request))

    def collect(self, wait_s: float) -> list[tuple[int, ReplyT]]:
        """The replies that came within `wait_s`; sooner when there is one for all that is in hand.

        Raises:
            RuntimeError: the fork server has ended, or none of its processes becomes ready.
        """
        end = time.monotonic() + wait_s
        while len(self._replies) < self._in_hand:
            self._dispatch()
            pause_s = min((end, *self._deadlines())) - time.monotonic()
            for key, events in self._selector.select(max(0.0, pause_s)):
                self._handle_event(key.data, events)
            self._kill_late()
            if time.monotonic() >= end:
                break
        replies = self._replies
        self._replies = []
        self._in_hand -= len(replies)
        return replies

    def close(self) -> None:
        """Kill all processes. Nothing in hand is answered any more."""
        for process in self._slots.values():
            process.connection.close()
        self._selector.close()
        self._fork_server.close()

    def _spawn(self, slot: int) -> None:
        process = PoolChild[RequestT](slot, self._fork_server.spawn(slot))
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

    def _send(self, process: PoolChild[RequestT]) -> None:
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

    def _handle_event(self, process: PoolChild[RequestT] | None, events: int) -> None:
        if process is None:
            self._replace(self._fork_server.next_exit())
        elif not process.ending:  # it may have been found dead earlier in this same round
            if events & selectors.EVENT_WRITE:
                self._send(process)
            if events & selectors.EVENT_READ:
                self._read(process)

    def _read(self, process: PoolChild[RequestT]) -> None:
        """Take the replies that have come."""
        try:
            while data := process.connection.recv(1 << 18):
                for frame in process.frames.feed(data):
                    self._take_frame(process, frame)
        except BlockingIOError:
            return
        except (ConnectionResetError, FrameError, *UNDECODABLE):
            # It died, or the user's code wrote to its socket. Nothing that follows can be trusted.
            pass
        self._end(process)

    def _take_frame(self, process: PoolChild[RequestT], frame: bytes) -> None:
        if not frame and not process.ready:
            process.ready = True
            self._failed_starts = 0
        elif not process.requests:
            raise FrameError("a reply without a request")
        else:
            reply = self._decode_reply(frame)
            self._finish_first(process, reply)
            if reply.retires:
                self._end(process, excused=True)

    def _finish_first(self, process: PoolChild[RequestT], reply: ReplyT) -> None:
        """Note the reply to the process's first request, and restart the clock for the next."""
        now = time.monotonic()
        self._replies.append((process.requests.popleft().key, reply))
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
                # A reply may have come while this process was busy elsewhere: it counts.
                self._read(process)
            if self._is_late(process):
                self._finish_first(process, self._timed_out)
                self._end(process, excused=True)

    def _is_late(self, process: PoolChild[RequestT]) -> bool:
        if not process.requests or process.ending:
            return False
        return time.monotonic() >= process.since + self._timeout_s

    def _end(self, process: PoolChild[RequestT], *, excused: bool = False) -> None:
        """Have the process killed. It may be dead already, or have closed its socket only."""
        if not process.ending:
            process.ending = True
            process.excused = excused
            self._selector.unregister(process.connection)
            self._fork_server.kill(process.slot)

    def _replace(self, exited: ChildExited) -> None:
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
                self._finish_first(process, self._crashed)
        self._queue.extendleft(reversed(process.requests))
        self._spawn(process.slot)

    def _count_failed_start(self, status: int) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(
                f"{self._failed_starts} {self._start_message.what} processes in a row ended as "
                f"they started, the last with status {status}"
            )
