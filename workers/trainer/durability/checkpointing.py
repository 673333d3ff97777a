"""When checkpoints are taken, what follows from them, and what happens while none can be written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.streams import Bus, Lease
from onstream.pipeline.run_files.ledger import Ledger
from onstream.pipeline.telemetry import get_logger
from onstream.settings.trainer import CheckpointSettings
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import CheckpointError, TrainerState
from onstream.workers.trainer.durability.disk_errors import disk_error

log = get_logger()

STREAM_OVERHEAD = 1.3  # what Redis takes for an entry, to its payload
FAILURES_ALLOWED = 10
LONGEST_RETRY_S = 30.0


@dataclass(frozen=True)
class Standing:
    """Where the training stands when a checkpoint is taken: `TrainerState` explains the fields."""

    step: int
    policy: PolicyVersion
    issued: int
    dropped: Mapping[str, int]
    recorded: int | None


class Checkpointing:
    """Keeps a run's checkpoints, its ledger and its acknowledgements in step. `state` is that of the
    checkpoint it resumes from.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        run_dir: Path,
        settings: CheckpointSettings,
        state: TrainerState | None,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._run_dir = run_dir
        self._settings = settings
        self._sequence, self._saved_step = (state.sequence, state.step) if state else (0, 0)
        self._failures = 0
        self._retry_at = 0.0
        self.acknowledgements = Acknowledgements(state)
        self.totals: dict[str, float] = dict(state.totals) if state else {}
        self.requeued: dict[int, int] = dict(state.requeued) if state else {}
        self.ledger = Ledger(run_dir / "trained.jsonl")
        self._ledger_bytes = state.ledger_bytes if state else 0
        if self.ledger.cut(self._ledger_bytes):
            log.error(
                "the ledger is shorter than the checkpoint remembers; writing it anew from it",
                path=str(self.ledger.path),
            )
            self._ledger_bytes = self.ledger.rewrite(
                self.acknowledgements.all_lines(self._saved_step)
            )

    def saved(self, step: int) -> bool:
        """Whether a checkpoint holds all there is at `step`."""
        return self._sequence > 0 and not self.unsaved(step)

    def unsaved(self, step: int) -> bool:
        """Whether there is anything at `step` that no checkpoint holds."""
        return step != self._saved_step or bool(self.acknowledgements.lines)

    def due(self, step: int, max_steps: int, *, full: bool) -> bool:
        """Whether a checkpoint should be taken at `step`: by the interval, at the end, or early for
        the bytes that wait for one.

        While Redis is `full`, any bytes will do: what one checkpoint settles is acknowledged by the
        next.
        """
        if time.monotonic() < self._retry_at:
            return False
        interval = self._settings.interval
        at_end = step >= max_steps and not self.saved(step)
        press = self._bytes_press() or (full and self.acknowledgements.unacked_bytes > 0)
        return at_end or step // interval > self._saved_step // interval or press

    @property
    def stalled(self) -> bool:
        """Whether to train nothing more: checkpoints fail, and what waits for them has reached its
        bound.
        """
        return (
            self._failures > 0
            and self.acknowledgements.unacked_bytes * STREAM_OVERHEAD
            >= self._settings.max_unacked_bytes
        )

    def save(self, now: Standing, write_files: Callable[[Path], None]) -> bool:
        """Write a checkpoint of `now`; False when it could not be, which is said, and tried again
        later.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it could not be written many times in a row.
        """
        try:
            size_bytes = self._write(now, write_files)
        except (CheckpointError, OSError) as error:
            self._failed(error)
            return False
        self._failures = 0
        self._retry_at = 0.0
        self._ledger_bytes = size_bytes
        self._saved_step = now.step
        self._sequence = self._sequence + 1
        self.acknowledgements.durable()
        settings = self._settings
        with self._bus.writing(self._lease):
            checkpoint.prune(
                self._directory,
                settings.keep,
                settings.keep_every,
                keep_optimizer=now.recorded is not None,
            )
        return True

    def pay(self) -> None:
        """Acknowledge what may be acknowledged.

        Raises:
            LeaseLost: another trainer took over.
        """
        if entries := self.acknowledgements.payable():
            self._bus.acknowledge(self._lease, entries)
            self.acknowledgements.paid(entries)

    @property
    def _directory(self) -> Path:
        return self._run_dir / checkpoint.FOLDER

    def _bytes_press(self) -> bool:
        # Half of the bound: what a checkpoint settles waits for the one after it while as much
        # again gathers.
        return (
            self.acknowledgements.since_bytes * STREAM_OVERHEAD
            >= self._settings.max_unacked_bytes / 2
        )

    def _write(self, now: Standing, write_files: Callable[[Path], None]) -> int:
        with self._bus.writing(self._lease):
            self.ledger.cut(self._ledger_bytes)  # an attempt that failed may have left its lines
            size_bytes = self.ledger.append(self.acknowledgements.lines)
        state = TrainerState(
            sequence=self._sequence + 1,
            step=now.step,
            policy=now.policy,
            issued=now.issued,
            settled={
                fate: numbers.ranges() for fate, numbers in self.acknowledgements.fates.items()
            },
            before=self.acknowledgements.before,
            ledger_bytes=size_bytes,
            totals=self.totals,
            requeued=self.requeued,
            dropped=dict(now.dropped),
            recorded=now.recorded,
        )
        checkpoint.save(
            self._directory, state, write_files, fence=lambda: self._bus.writing(self._lease)
        )
        return size_bytes

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        with self._bus.writing(self._lease):
            self.ledger.cut(self._ledger_bytes)
        pause_s = min(2.0**self._failures / 2, LONGEST_RETRY_S)
        log.error(
            "no checkpoint could be written; the ones before stand, and training goes on",
            problem=str(error),
            failures=self._failures,
            allowed=FAILURES_ALLOWED,
            retry_in_s=pause_s,
        )
        if self._failures >= FAILURES_ALLOWED:
            raise disk_error(self._run_dir, error) from error
        self._retry_at = time.monotonic() + pause_s
