"""The second thread of a worker: it keeps leases and heartbeats alive while the first one works,
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
from onstream.pipeline.records import StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.connection import OUTAGE
from onstream.pipeline.stage import Stats
from onstream.settings.sections.run import DeliverySettings

log = structlog.get_logger(__name__)

BEAT_S = 1.0
UNBLOCK_S = 0.05


@dataclass
class Life:
    """What the worker's two threads know of each other. Each field has one writer, named beside it."""

    stage: StageName
    holds_entries: bool
    stats: Stats  # the stage
    state: Literal["starting", "running", "draining"] = "starting"  # the loop
    slice_since: float | None = (
        None  # the loop: when the current slice of work began, by the monotonic clock
    )
    hand: set[bytes] = field(default_factory=set)  # the loop: entries that this worker answers for
    done: int = 0  # the loop
    dead: int = 0  # the loop
    told_to_stop: bool = False  # the signal handler
    finished: bool = False  # the pulse: the run has ended
    failure: Exception | None = None  # the pulse: why the worker must not go on

    @property
    def ends(self) -> bool:
        """Whether the worker takes nothing new any more."""
        return self.told_to_stop or self.finished or self.failure is not None


class Pulse(threading.Thread):
    """Consumes nothing; waits for its next beat; is unblocked by `wake`; produces heartbeats,
    renewed leases and unblocked reads.
    """

    def __init__(self, bus: Bus, life: Life, delivery: DeliverySettings) -> None:
        super().__init__(name="pulse", daemon=True)
        self._bus = bus
        self._life = life
        self._delivery = delivery
        self._interval_s = min(BEAT_S, delivery.lease / 4, delivery.max_handle / 4)
        self._wakes: queue.SimpleQueue[bool] = (
            queue.SimpleQueue()
        )  # its put, unlike an Event's set, is safe in a signal handler
        self._renewed = time.monotonic()
        self._beaten = float("-inf")

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
        """Beat until told to end. A failure of its own ends the worker: nobody would renew its
        leases.
        """
        while self._rest():
            try:
                self._beat()
            except OUTAGE as error:
                log.warning("redis does not answer the heartbeat", error=str(error))
            except Exception as error:
                self._life.failure = error

    def _rest(self) -> bool:
        ends_soon = self._life.ends and self._life.state == "running"
        try:
            return self._wakes.get(timeout=UNBLOCK_S if ends_soon else self._interval_s)
        except queue.Empty:
            return True

    def _beat(self) -> None:
        life = self._life
        now = time.monotonic()
        self._exit_if_stuck(now)
        if life.ends and life.state == "running":
            # repeated: the first may come just before the read that it should end
            self._bus.connection.unblock()
        if now - self._renewed >= self._delivery.lease / 3:
            self._renew()
        if now - self._beaten >= self._interval_s / 2:
            self._tell()

    def _renew(self) -> None:
        if not self._life.holds_entries:
            self._bus.streams.renew(self._life.stage, tuple(self._life.hand))
        self._renewed = time.monotonic()

    def _tell(self) -> None:
        life = self._life
        if (lease := self._bus.lease.current) is not None:
            self._bus.lease.renew_from_heartbeat(lease)
        stats = (
            life.stats
            if life.holds_entries
            else replace(life.stats, done=life.done, dead=life.dead)
        )
        self._bus.state.write_heartbeat(life.stage, stats, state=life.state, in_hand=len(life.hand))
        self._beaten = time.monotonic()
        if life.state == "running" and not life.finished and self._bus.state.finished():
            life.finished = True
            self._bus.connection.unblock()

    def _exit_if_stuck(self, now: float) -> None:
        since = self._life.slice_since
        if since is not None and now - since > self._delivery.max_handle:
            log.critical(
                "the worker is stuck and ends; its records go to another one",
                seconds=round(now - since, 1),
                max_handle_s=self._delivery.max_handle,
                in_hand=len(self._life.hand),
            )
            os._exit(Exit.STUCK)
