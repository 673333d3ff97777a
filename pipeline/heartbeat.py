"""The second thread of a worker. It renews leases and writes heartbeats while the first one works,
and ends a worker that is stuck.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import structlog

from onstream.pipeline.errors import Exit
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.connection import OUTAGE
from onstream.pipeline.redis.run_end import RunEnd
from onstream.pipeline.stage import Stats
from onstream.settings.sections.run import DeliverySettings
from onstream.settings.stages import StreamName

log = structlog.get_logger(__name__)

BEAT_S = 1.0
UNBLOCK_S = 0.05


@dataclass
class LoopState:
    """What the worker's two threads know of each other.

    Each field has one writer, named beside it; the other thread only reads. `in_hand` are the
    entries that this worker answers for.
    """

    stage: StreamName
    holds_entries: bool
    stats: Stats  # the stage
    state: Literal["starting", "running", "draining"] = "starting"  # the loop
    slice_since: float | None = None  # the loop: start of the current slice, monotonic seconds
    in_hand: set[bytes] = field(default_factory=set)  # the loop
    done: int = 0  # the loop
    dead: int = 0  # the loop
    told_to_stop: bool = False  # the signal handler
    finished: bool = False  # the heartbeat: the run has ended
    failure: Exception | None = None  # the heartbeat: why the worker must not go on

    @property
    def ends(self) -> bool:
        """Whether the worker takes nothing new any more."""
        return self.told_to_stop or self.finished or self.failure is not None


class Heartbeat(threading.Thread):
    """Consumes nothing; waits for its next beat; is unblocked by `wake`; produces heartbeats,
    renewed leases and unblocked reads. `run_end` says when the run has ended.
    """

    def __init__(
        self, bus: Bus, loop: LoopState, delivery: DeliverySettings, run_end: RunEnd
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._bus = bus
        self._loop = loop
        self._delivery = delivery
        self._run_end = run_end
        self._interval_s = min(BEAT_S, delivery.lease / 4, delivery.max_handle / 4)
        # the put of a SimpleQueue, unlike the set of an Event, is safe in a signal handler
        self._wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._renewed = time.monotonic()
        self._written = float("-inf")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wakes.put(False)
        self.join()

    def wake(self) -> None:
        """Look around now. Safe in a signal handler."""
        self._wakes.put(True)

    def run(self) -> None:
        """Beat until told to end. A failure here ends the worker: nobody would renew its leases."""
        while self._rest():
            try:
                self._beat()
            except OUTAGE as error:
                log.warning("redis does not answer the heartbeat", error=str(error))
            except Exception as error:
                self._loop.failure = error

    def _rest(self) -> bool:
        """Wait for the next beat; False when told to end."""
        ends_soon = self._loop.ends and self._loop.state == "running"
        try:
            return self._wakes.get(timeout=UNBLOCK_S if ends_soon else self._interval_s)
        except queue.Empty:
            return True

    def _beat(self) -> None:
        now = time.monotonic()
        self._exit_if_stuck(now)
        if self._loop.ends and self._loop.state == "running":
            # Repeated with every short beat: this call may come just before the loop begins the
            # blocking read that it should end.
            self._bus.connection.unblock()
        if now - self._renewed >= self._delivery.lease / 3:
            self._renew()
        if now - self._written >= self._interval_s / 2:
            self._write()

    def _renew(self) -> None:
        if not self._loop.holds_entries:
            # A copy: the loop changes the set meanwhile. An entry that has just moved on is not
            # renewed, as it is not pending any more.
            self._bus.streams.renew(self._loop.stage, tuple(self._loop.in_hand))
        self._renewed = time.monotonic()

    def _write(self) -> None:
        loop = self._loop
        if (lease := self._bus.lease.current) is not None:
            self._bus.lease.renew_from_heartbeat(lease)
        stats = loop.stats
        if not loop.holds_entries:
            stats = replace(stats, done=loop.done, dead=loop.dead)
        self._bus.state.write_heartbeat(
            loop.stage, stats, state=loop.state, in_hand=len(loop.in_hand)
        )
        self._written = time.monotonic()
        if loop.state == "running" and not loop.finished and self._run_end.reached():
            loop.finished = True
            self._bus.connection.unblock()

    def _exit_if_stuck(self, now: float) -> None:
        slice_since = self._loop.slice_since
        if slice_since is None:
            return
        since = max(slice_since, self._loop.stats.phase_since)
        if now - since > self._delivery.max_handle:
            log.critical(
                "the worker is stuck and ends; its records go to another one",
                seconds=round(now - since, 1),
                max_handle_s=self._delivery.max_handle,
                in_hand=len(self._loop.in_hand),
            )
            os._exit(Exit.STUCK)
