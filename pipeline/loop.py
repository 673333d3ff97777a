"""The one loop of all workers: read, decode, handle, hop; with leases, re-delivery, dead letters,
signals and drain.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import structlog
from redis.exceptions import RedisError

from onstream.pipeline.errors import Exit, LeaseLost, UserError
from onstream.pipeline.heartbeat import Life, Pulse
from onstream.pipeline.intake import Intake
from onstream.pipeline.records import (
    RecordError,
    Rollout,
    StageName,
    Ticket,
    Tombstone,
    Work,
    decode_work,
    encode,
)
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.connection import OUTAGE
from onstream.pipeline.redis.run_state import FAILED
from onstream.pipeline.redis.streams import Entry, Move, Out
from onstream.pipeline.stage import Delivery, Outcome, Stage, Stats, complete_stage
from onstream.settings.sections.run import DeliverySettings
from onstream.settings.stages import STAGES

log = structlog.get_logger(__name__)

RECORDS: dict[str, type[Work]] = {
    record.__name__: record for record in (Ticket, Rollout, Tombstone)
}
TAKES: dict[StageName, tuple[type[Work], ...]] = {
    stage.name: tuple(RECORDS[name] for name in stage.takes) for stage in STAGES
}
IDLE_S = 0.01
IMPATIENT_S = (
    1.0  # a second signal so long after the first one is a person's, not an echo of the terminal
)


def run_worker(stage: Stage, bus: Bus, delivery: DeliverySettings, *, block_s: float) -> Exit:
    """Work as `stage` until the run has finished, or SIGTERM or SIGINT says to stop; for the main
    thread alone.

    Raises:
        UserError: the stage cannot work with these settings.
    """
    return Worker(stage, bus, delivery, block_s).run()


class Interrupted(Exception):
    """A signal came while the stage was setting up."""


class Worker:
    """One worker.

    Consumes the stream of its stage; waits for new entries, up to `block_s` at once, and only while
    the stage is not busy; is unblocked by a signal and by the end of the run, through the pulse;
    produces records for the next stage, dead letters and tombstones. An entry leaves its stream in
    the same script that writes what comes of it.
    """

    def __init__(self, stage: Stage, bus: Bus, delivery: DeliverySettings, block_s: float) -> None:
        self.stage = stage
        self.bus = bus
        self.delivery = delivery
        self.block_s = block_s
        stats = getattr(stage, "stats", None)
        self.life = Life(
            stage.name, stage.holds_entries, stats if isinstance(stats, Stats) else Stats()
        )
        self.intake = Intake(bus, self.life, delivery)
        self.pulse = Pulse(bus, self.life, delivery)
        self.outage_since: float | None = None

    def run(self) -> Exit:
        """The worker's whole life; returns its exit code.

        Raises:
            UserError: the stage cannot work with these settings.
        """
        try:
            return self._live()
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
            self._say_failed(str(error))
            raise
        except Exception:
            log.exception(
                "the worker failed; what was in hand stays pending and is handed to another one"
            )
            self._say_failed("see its last error")
            return Exit.FAILED

    def _live(self) -> Exit:
        with self.pulse, self._signals():
            self.stage.setup()
            self.bus.state.mark_ready(self.stage.name)
            self.life.state = "running"
            while not self.life.ends:
                self.turn()
            return self._end()

    def _say_failed(self, why: str) -> None:
        """A last heartbeat, so that `onstream status` says what this worker died of."""
        try:
            self.bus.state.write_heartbeat(
                self.stage.name,
                replace(self.life.stats, detail=why),
                state=FAILED,
                in_hand=len(self.life.hand),
            )
        except RedisError as error:
            log.warning("redis does not take the last heartbeat", error=str(error))

    def turn(self) -> None:
        """Take entries, let the stage do one slice of work, and move on what is ready."""
        self.handle(self.accept(self._take()))

    def accept(self, entries: Sequence[Entry]) -> list[Delivery]:
        """The deliveries in `entries`. What is none, or was handed out too often, goes to the dead
        letters at once.
        """
        deliveries = []
        moves = []
        for entry in entries:
            delivery = self._delivery(entry)
            if isinstance(delivery, str):
                moves.append(
                    self._dead(entry.id, entry.number, entry.payload, delivery, entry.deliveries)
                )
            else:
                deliveries.append(delivery)
        self._settle(moves)
        return deliveries

    def handle(self, new: Sequence[Delivery]) -> None:
        """One slice of the stage's work."""
        self.life.slice_since = time.monotonic()
        outcomes = self.stage.handle(new)
        self.life.slice_since = None
        self._settle([self._move(outcome) for outcome in outcomes if not outcome.elsewhere])
        for outcome in outcomes:
            if outcome.elsewhere:
                self.life.hand.discard(outcome.delivery.entry_id)
        if not new and not outcomes and not self.stage.busy:
            time.sleep(IDLE_S)  # the stage is full, or waits for something that is no entry

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
        """How long to wait for new entries. A stage that holds some, and is not busy, waits for
        something else (new weights).
        """
        if self.stage.busy:
            return 0.0
        return (
            min(IDLE_S, self.block_s)
            if self.life.hand and not self.stage.holds_entries
            else self.block_s
        )

    def _wait_out(self, error: Exception) -> None:
        """Let an outage pass; what the lost reply carried is looked for after it."""
        now = time.monotonic()
        if self.outage_since is None:
            log.warning(
                "redis does not answer; trying again",
                error=str(error),
                patience_s=self.bus.connection.patience_s,
            )
            self.outage_since = now
        if now - self.outage_since > self.bus.connection.patience_s:
            raise error
        self.intake.reconnect()
        time.sleep(IDLE_S * 10)

    def _delivery(self, entry: Entry) -> Delivery | str:
        """The entry decoded, or why it is a dead letter."""
        if entry.deliveries > self.delivery.max_deliveries and not self.stage.holds_entries:
            return f"handed out {entry.deliveries - 1} times and never finished; max_deliveries is {self.delivery.max_deliveries}"
        try:
            record = decode_work(entry.payload)
        except RecordError as error:
            return str(error)
        if not isinstance(record, TAKES[self.stage.name]):
            return f"a {type(record).__name__} in the stream of {self.stage.name}"
        if record.number != entry.number:
            return f"the entry has the number {entry.number} and its record {record.number}"
        return Delivery(
            entry.id, record.number, record, len(entry.payload), entry.deliveries, time.time()
        )

    def _move(self, outcome: Outcome) -> Move:
        delivery = outcome.delivery
        record = outcome.record
        if outcome.dead is not None:
            return self._dead(
                delivery.entry_id,
                delivery.number,
                encode(delivery.record),
                outcome.dead,
                delivery.deliveries,
            )
        if isinstance(record, Tombstone):
            return Move(delivery.entry_id, [Out("train", delivery.number, encode(record))])
        if record is None:
            raise ValueError(
                f"{self.stage.name} returned neither a record nor a reason for the rollout {delivery.number}"
            )
        complete_stage(record, self.stage.name, self.bus.consumer, delivery.taken)
        if not record.route:
            raise ValueError(
                f"{self.stage.name} returned the rollout {delivery.number} with an empty route"
            )
        return Move(delivery.entry_id, [Out(record.route[0], delivery.number, encode(record))])

    def _dead(
        self, entry_id: bytes, number: int, payload: bytes, reason: str, deliveries: int
    ) -> Move:
        log.error("dead letter", number=number, reason=reason, deliveries=deliveries)
        outs = [Out("dead", number, payload, reason, deliveries)]
        if number > 0:
            outs.append(Out("train", number, encode(Tombstone(number, self.stage.name, reason))))
        return Move(entry_id, outs)

    def _settle(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        for move, moved in zip(moves, self.bus.streams.move(self.stage.name, moves), strict=True):
            self.life.hand.discard(move.entry_id)
            self.life.done += moved
            self.life.dead += moved and move.outs[0].to == "dead"
            if not moved:
                log.info("somebody else finished this record first", number=move.outs[0].number)

    def _end(self) -> Exit:
        """Finish what is in hand, give back the rest, and go."""
        self.life.state = "draining"
        if self.life.failure is not None:
            raise self.life.failure
        if not self.stage.holds_entries:
            self._drain()
        self.stage.close(finished=self.life.finished)
        self._leave_run()
        log.info(
            "the run has ended" if self.life.finished else "stopped",
            done=self.life.done,
            dead=self.life.dead,
        )
        return Exit.OK

    def _leave_run(self) -> None:
        if self.bus.lease.current is not None:
            self.bus.lease.release(self.bus.lease.current)
        self.bus.streams.retire(self.stage.name)

    def _drain(self) -> None:
        deadline = time.monotonic() + self.delivery.drain
        while (
            self.life.hand
            and self.stage.busy
            and not self.life.finished
            and time.monotonic() < deadline
        ):
            self.handle([])
        if self.life.hand:
            given = self.bus.streams.give_back(self.stage.name, list(self.life.hand))
            log.info("gave back what was not finished", records=given)
            self.life.hand.clear()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        told: list[float] = []

        def stop(number: int, frame: FrameType | None) -> None:
            told.append(time.monotonic())
            self.life.told_to_stop = True
            self.pulse.wake()
            if self.life.state == "starting":
                raise Interrupted
            if told[-1] - told[0] > IMPATIENT_S:
                os._exit(Exit.FAILED)  # nothing is lost: what is in hand stays pending

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
