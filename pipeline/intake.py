"""Where a worker's entries come from: handed out before and not finished, or new."""

from __future__ import annotations

import random
import time
from collections import deque

import structlog

from onstream.pipeline.heartbeat import LoopState
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Entry, PendingRow
from onstream.settings.sections.run import DeliverySettings

log = structlog.get_logger(__name__)

READ_AT_ONCE = 64
SCAN_AT_ONCE = 256
ALONE_FROM = 3
DEAD_CONSUMER_S = 60.0


class Intake:
    """Decides which entries a worker takes next. `take` gives out new and re-delivered ones alike.

    An entry that was handed out twice in vain is a suspect. It is taken alone, with nothing else in
    hand, so that it cannot raise the count of deliveries of others. `in_hand` of the loop's state
    holds what this worker answers for; the trainer's, all that it got and has not acknowledged.
    """

    def __init__(self, bus: Bus, loop: LoopState, delivery: DeliverySettings) -> None:
        self._bus = bus
        self._loop = loop
        self._delivery = delivery
        self._alone_from = min(ALONE_FROM, delivery.max_deliveries)
        self._again: deque[PendingRow] = deque()
        self._suspects: deque[PendingRow] = deque()
        self._alone: bytes | None = None
        self._min_idle_s = 0.0  # of the rows found by the last scan
        self._next_scan = 0.0
        # whether the next scan looks for entries that are pending with this worker's own name
        self._scans_own = True

    def reconnect(self) -> None:
        """Look for what a lost reply carried: a read failed, and may have handed out entries."""
        self._scans_own = True
        self._next_scan = 0.0

    def take(self, room: int, wait_s: float) -> list[Entry]:
        """Up to `room` entries, waiting up to `wait_s` for a first new one.

        Raises:
            redis.ConnectionError, redis.TimeoutError: Redis is away.
        """
        if room <= 0 or (self._alone is not None and self._alone in self._loop.in_hand):
            return []
        self._alone = None
        self._scan_if_due()
        count = min(room, READ_AT_ONCE)
        if self._again:
            return self._claim([self._again.popleft() for _ in range(min(count, len(self._again)))])
        if self._suspects:
            return [] if self._loop.in_hand else self._take_alone()
        return self._read(count, min(wait_s, max(0.0, self._next_scan - time.monotonic())))

    def _read(self, count: int, wait_s: float) -> list[Entry]:
        entries = self._bus.streams.read(self._loop.stage, count, wait_s)
        self._loop.in_hand.update(entry.id for entry in entries)
        return entries

    def _take_alone(self) -> list[Entry]:
        entries = self._claim([self._suspects.popleft()])
        self._alone = entries[0].id if entries else None
        return entries

    def _claim(self, rows: list[PendingRow]) -> list[Entry]:
        """Those of `rows` that are still as idle as the scan found them: between the scan and this,
        another worker may have claimed an entry, or its owner renewed it.
        """
        rows = [row for row in rows if row.id not in self._loop.in_hand]
        entries = self._bus.streams.claim(self._loop.stage, rows, self._min_idle_s)
        self._loop.in_hand.update(entry.id for entry in entries)
        return entries

    def _scan_if_due(self) -> None:
        if time.monotonic() < self._next_scan or self._again or self._suspects:
            return
        rows = self._scan_all() if self._loop.holds_entries else self._scan_idle()
        rows = [row for row in rows if row.id not in self._loop.in_hand]
        if not rows:
            # spread, so that workers that started together do not scan together
            pause_s = self._delivery.lease / 2 * random.uniform(0.75, 1.25)
            self._next_scan = time.monotonic() + pause_s
            return
        log.info("records were handed out before and not finished; taking them", records=len(rows))
        for row in rows:
            suspect = not self._loop.holds_entries and row.deliveries + 1 >= self._alone_from
            (self._suspects if suspect else self._again).append(row)

    def _scan_idle(self) -> list[PendingRow]:
        """What was pending with this worker when it started or lost its connection; after that,
        what nobody renewed.
        """
        stage = self._loop.stage
        if self._scans_own:
            self._scans_own = False
            self._min_idle_s = 0.0
            if rows := list(self._bus.streams.all_pending_rows(stage, self._bus.consumer)):
                return rows
        self._min_idle_s = self._delivery.lease
        dead_s = max(DEAD_CONSUMER_S, 4 * self._delivery.lease)
        self._bus.streams.forget_dead_consumers(stage, dead_s)
        return self._bus.streams.pending_rows(
            stage, count=SCAN_AT_ONCE, min_idle_s=self._min_idle_s
        )

    def _scan_all(self) -> list[PendingRow]:
        """Everything pending, whoever had it: there is one trainer. What it has acknowledged since
        leaves `in_hand`.
        """
        rows = list(self._bus.streams.all_pending_rows(self._loop.stage))
        self._loop.in_hand &= {row.id for row in rows}
        return rows
