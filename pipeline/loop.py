"""The one loop of all workers: read, decode, handle, hop; with leases, re-delivery, dead letters,
signals and drain.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import structlog
from redis.exceptions import RedisError

from onstream.pipeline.errors import Exit, LeaseLost, UserError
from onstream.pipeline.heartbeat import Heartbeat, LoopState
from onstream.pipeline.processes import StopSignals
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.connection import OUTAGE
from onstream.pipeline.redis.run_end import RunEnd
from onstream.pipeline.redis.run_state import FAILED
from onstream.pipeline.redis.streams import Entry, Move, PendingRow
from onstream.pipeline.stage import (
    Delivery,
    NotForThisStage,
    Stage,
    dead_letter,
    delivery_of,
    move_of,
)
from onstream.settings.sections.run import DeliverySettings

log = structlog.get_logger(__name__)

READ_AT_ONCE = 64
READ_BYTES = 32 << 20  # of one reply: Redis serves nobody else while it is copied
SCAN_AT_ONCE = 256
ALONE_FROM = 3
DEAD_CONSUMER_S = 60.0
IDLE_S = 0.01
IMPATIENT_S = 1.0
"""A second signal so long after the first is a person's, not an echo of the terminal."""


def run_worker(
    stage: Stage,
    bus: Bus,
    delivery: DeliverySettings,
    *,
    block_s: float,
    max_steps: int = 0,
    longest_bytes: int = 0,
) -> Exit:
    """Work as `stage` until the run has ended, or SIGTERM or SIGINT says to stop; for the main
    thread alone. An end before `max_steps` that was there already does not count. No record of the
    stage's stream should be longer than `longest_bytes`.

    Raises:
        UserError: the stage cannot work with these settings.
    """
    return Worker(stage, bus, delivery, block_s, max_steps, longest_bytes).run()


class Interrupted(Exception):
    """A signal came while the stage was setting up."""


class Worker:
    """One worker.

    Consumes the stream of its stage; waits for new entries, up to `block_s` at once, and only while
    the stage is not busy; is unblocked by a signal and by the end of the run, through the
    heartbeat's thread; produces records for the next stage, dead letters and tombstones. An entry
    leaves its stream in the same script that writes what comes of it.
    """

    def __init__(
        self,
        stage: Stage,
        bus: Bus,
        delivery: DeliverySettings,
        block_s: float,
        max_steps: int = 0,
        longest_bytes: int = 0,
    ) -> None:
        self.stage = stage
        self.bus = bus
        self.delivery = delivery
        self.block_s = block_s
        self.state = LoopState(stage.name, stage.holds_entries, stage.stats)
        self.intake = Intake(bus, self.state, delivery, longest_bytes)
        run_end = RunEnd(bus.state, max_steps)
        self.heartbeat = Heartbeat(bus, self.state, delivery, run_end)
        self.signals = StopSignals(self._stop)
        self.outage_since: float | None = None

    def run(self) -> Exit:
        """Work until the end; returns the exit code.

        Raises:
            UserError: the stage cannot work with these settings.
        """
        try:
            return self._work()
        except Interrupted:
            log.info("told to stop before it was ready")
            self._leave_run()
            return Exit.OK
        except OUTAGE as error:
            log.error(
                "redis did not come back; what was in hand stays pending",
                error=str(error),
                patience_s=self.bus.connection.patience_s,
            )
            return Exit.UNREACHABLE
        except LeaseLost as error:
            log.error("another trainer took the run over", error=str(error))
            return Exit.REFUSED
        except UserError as error:
            self._report_failure(str(error))
            raise
        except Exception:
            log.exception(
                "the worker failed; what was in hand stays pending and is handed to another one"
            )
            self._report_failure("see its last error")
            return Exit.FAILED

    def _work(self) -> Exit:
        with self.heartbeat, self.signals:
            self.stage.setup()
            self.bus.state.mark_ready(self.stage.name)
            self.state.state = "running"
            while not self.state.ends:
                self.turn()
            return self._end()

    def turn(self) -> None:
        """Take entries, let the stage do one slice of work, and move on what is ready."""
        self.handle(self.accept(self._take()))

    def accept(self, entries: Sequence[Entry]) -> list[Delivery]:
        """The deliveries in `entries`. An entry that is none, or that was handed out too often,
        goes to the dead letters at once.
        """
        deliveries = []
        moves = []
        for entry in entries:
            try:
                self._refuse_too_often(entry)
                deliveries.append(delivery_of(entry, self.stage.name, self.bus.limits))
            except NotForThisStage as refusal:
                refused = replace(entry, number=refusal.number)
                moves.append(dead_letter(refused, self.stage.name, str(refusal)))
        self._move(moves)
        return deliveries

    def handle(self, new: Sequence[Delivery]) -> None:
        """Let the stage do one slice of work, with `new` deliveries, and move on what is ready."""
        self.state.slice_since = time.monotonic()
        outcomes = self.stage.handle(new)
        self.state.slice_since = None
        moves = []
        for outcome in outcomes:
            if outcome.elsewhere:
                self.state.in_hand.discard(outcome.delivery.entry_id)
            else:
                moves.append(move_of(outcome, self.stage.name, self.bus.consumer))
        self._move(moves)
        if not new and not outcomes and not self.stage.busy:
            time.sleep(IDLE_S)  # the stage is full, or waits for something that is no entry

    def _move(self, moves: Sequence[Move]) -> None:
        """Move entries on. XACK decides in Redis who was first: one that slept past its lease, and
        whose entry another worker has finished, moves nothing and counts nothing.
        """
        if not moves:
            return
        for move, moved in zip(moves, self.bus.streams.move(self.stage.name, moves), strict=True):
            self.state.in_hand.discard(move.entry_id)
            self.state.done += moved
            self.state.dead += moved and move.outs[0].to == "dead"
            if not moved:
                log.info("somebody else finished this record first", number=move.outs[0].number)

    def _refuse_too_often(self, entry: Entry) -> None:
        most = self.delivery.max_deliveries
        if entry.deliveries > most and not self.stage.holds_entries:
            raise NotForThisStage(
                f"handed out {entry.deliveries - 1} times and never finished; "
                f"max_deliveries is {most}",
                entry.number if self.bus.limits.was_issued(entry.number) else 0,
            )

    def _take(self) -> list[Entry]:
        try:
            entries = self.intake.take(self.stage.room, self._wait_s)
        except OUTAGE as error:
            self._wait_out(error)
            return []
        self.outage_since = None
        return entries

    @property
    def _wait_s(self) -> float:
        """How long to wait for new entries. A stage that has some in hand and is not busy waits for
        something else, new weights say, so it is asked again soon.
        """
        if self.stage.busy:
            return 0.0
        if self.state.in_hand and not self.stage.holds_entries:
            return min(IDLE_S, self.block_s)
        return self.block_s

    def _wait_out(self, error: Exception) -> None:
        """Let an outage pass. The reply that was lost may have handed out entries; `reconnect` has
        the next scan look for them.
        """
        now = time.monotonic()
        patience_s = self.bus.connection.patience_s
        if self.outage_since is None:
            log.warning(
                "redis does not answer; trying again", error=str(error), patience_s=patience_s
            )
            self.outage_since = now
        if now - self.outage_since > patience_s:
            raise error
        self.intake.reconnect()
        time.sleep(IDLE_S * 10)

    def _stop(self) -> None:
        """Within the signal handler: end after the current slice, at once when told again."""
        self.state.told_to_stop = True
        self.heartbeat.wake()
        if self.state.state == "starting":
            raise Interrupted
        if self.signals.since_first_s > IMPATIENT_S:
            os._exit(Exit.FAILED)  # nothing is lost: what is in hand stays pending

    def _end(self) -> Exit:
        """Finish what is in hand, give back the rest, and go."""
        self.state.state = "draining"
        if self.state.failure is not None:
            raise self.state.failure
        if not self.stage.holds_entries:
            self._drain()
        finished = self.state.finished
        self.stage.close(finished=finished)
        self._leave_run()
        log.info(
            "the run has ended" if finished else "stopped",
            done=self.state.done,
            dead=self.state.dead,
        )
        return Exit.OK

    def _drain(self) -> None:
        deadline = time.monotonic() + self.delivery.drain
        while self._has_work_to_drain() and time.monotonic() < deadline:
            self.handle([])
        if self.state.in_hand:
            # Parked for whoever is next, and the delivery uncounted: it was not tried in vain.
            given = self.bus.streams.give_back(self.stage.name, list(self.state.in_hand))
            log.info("gave back what was not finished", records=given)
            self.state.in_hand.clear()

    def _has_work_to_drain(self) -> bool:
        return bool(self.state.in_hand) and self.stage.busy and not self.state.finished

    def _leave_run(self) -> None:
        """Release the lease, if this is the trainer, and delete the consumer and the heartbeat.
        Redis keeps a consumer that has entries pending: with it, it would forget them.
        """
        if self.bus.lease.current is not None:
            self.bus.lease.release(self.bus.lease.current)
        self.bus.streams.retire(self.stage.name)

    def _report_failure(self, why: str) -> None:
        """Write a last heartbeat, so that `onstream status` says what this worker died of."""
        stats = replace(self.state.stats, detail=why)
        try:
            self.bus.state.write_heartbeat(
                self.stage.name, stats, state=FAILED, in_hand=len(self.state.in_hand)
            )
        except RedisError as error:
            log.warning("redis does not take the last heartbeat", error=str(error))


class Intake:
    """Decides which entries a worker takes next. `take` gives out new and re-delivered ones alike.

    An entry that was handed out twice in vain is a suspect. It is taken alone, with nothing else in
    hand, so that it cannot raise the count of deliveries of others. `in_hand` of the loop's state
    holds what this worker answers for; the trainer's, all that it got and has not acknowledged.
    A read brings no more records than are within `READ_BYTES` where each is as long as any may be,
    by `longest_bytes` and by those that came lately; and one at least.
    """

    def __init__(
        self, bus: Bus, loop: LoopState, delivery: DeliverySettings, longest_bytes: int = 0
    ) -> None:
        self._bus = bus
        self._loop = loop
        self._delivery = delivery
        self._alone_from = min(ALONE_FROM, delivery.max_deliveries)
        self._longest_bytes = longest_bytes
        self._longest_seen_bytes = 0
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
        longest = max(1, self._longest_bytes, self._longest_seen_bytes)
        count = min(room, READ_AT_ONCE, max(1, READ_BYTES // longest))
        if self._again:
            return self._claim([self._again.popleft() for _ in range(min(count, len(self._again)))])
        if self._suspects:
            return [] if self._loop.in_hand else self._take_alone()
        wait_s = min(wait_s, max(0.0, self._next_scan - time.monotonic()))
        return self._taken(self._bus.streams.read(self._loop.stage, count, wait_s))

    def _taken(self, entries: list[Entry]) -> list[Entry]:
        self._loop.in_hand.update(entry.id for entry in entries)
        longest = max((len(entry.payload) for entry in entries), default=0)
        # Halved, so that one absurd record does not slow this worker for ever.
        self._longest_seen_bytes = max(longest, self._longest_seen_bytes // 2)
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
        return self._taken(self._bus.streams.claim(self._loop.stage, rows, self._min_idle_s))

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
