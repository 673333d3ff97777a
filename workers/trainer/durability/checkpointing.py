"""When checkpoints are taken, what follows from one, and what happens while none can be written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.durable import digest_of
from onstream.pipeline.run_files.ledger import LEDGER, Ledger, ledger_differs
from onstream.pipeline.run_files.recording import JournalMark
from onstream.pipeline.telemetry import get_logger
from onstream.settings.record_sizes import STREAM_OVERHEAD
from onstream.settings.sections.trainer import CheckpointSettings
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import CheckpointError, TrainerState
from onstream.workers.trainer.durability.run_directory import (
    FAILURES_ALLOWED,
    disk_error,
    retry_after_s,
)

log = get_logger()


@dataclass(frozen=True)
class TrainerPosition:
    """What a checkpoint says of the training: the fields of `TrainerState` by the same names."""

    step: int
    policy: PolicyVersion
    issued: int
    journal: JournalMark
    dropped: dict[str, int] = field(default_factory=dict)
    recorded: int | None = None


class Checkpointing:
    """Takes a run's checkpoints, and keeps its ledger and its acknowledgements in step with them.

    `requeued` and `totals` are what checkpoints hold beside the training's own position. `requeued`
    is one dictionary, shared with who issues tickets: the next checkpoint holds what is requeued.

    Args:
        state: that of the checkpoint to resume from; None at the start of the run.
        max_unacked_bytes: how much of Redis records may hold that wait for a checkpoint.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        run_dir: Path,
        settings: CheckpointSettings,
        state: TrainerState | None,
        *,
        max_unacked_bytes: int,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._run_dir = run_dir
        self._directory = run_dir / checkpoint.FOLDER
        self._settings = settings
        self._max_unacked_bytes = max_unacked_bytes
        self._sequence = state.sequence if state else 0
        self._saved_step = state.step if state else 0
        self._failures = 0
        self._retry_at = 0.0
        self.acknowledgements = Acknowledgements(state)
        self.totals: dict[str, float] = dict(state.totals) if state else {}
        self.requeued: dict[int, int] = dict(state.requeued) if state else {}
        self._ledger = Ledger(run_dir / LEDGER)
        self._ledger_bytes = self._cut_ledger(state)

    def count(self, row: Mapping[str, Any]) -> None:
        """Add a step's metrics `row` to the totals."""
        for name in ("rollouts", "tokens", "step_s"):
            self.totals[name] = self.totals.get(name, 0) + row[name]

    def saved(self, step: int) -> bool:
        """Whether a checkpoint holds all there is at `step`."""
        return self._sequence > 0 and not self.unsaved(step)

    def unsaved(self, step: int) -> bool:
        """Whether there is anything at `step` that no checkpoint holds."""
        return step != self._saved_step or bool(self.acknowledgements.unsaved_lines)

    def due(self, step: int, max_steps: int, *, full: bool) -> bool:
        """Whether to take a checkpoint at `step`: by the interval, at the end, or for the bytes.

        While Redis is `full`, any bytes that wait for a checkpoint will do: what one settles is
        acknowledged by the next.
        """
        if time.monotonic() < self._retry_at:
            return False
        interval = self._settings.interval
        at_end = step >= max_steps and not self.saved(step)
        by_interval = step // interval > self._saved_step // interval
        by_bytes = full and self.acknowledgements.waiting_bytes > 0
        return at_end or by_interval or by_bytes or self._many_bytes_unsaved()

    @property
    def stalled(self) -> bool:
        """Whether to train no more: checkpoints fail, and what waits for one is at its bound."""
        waiting_bytes = self.acknowledgements.waiting_bytes * STREAM_OVERHEAD
        return self._failures > 0 and waiting_bytes >= self._max_unacked_bytes

    def save(self, position: TrainerPosition, write_files: Callable[[Path], None]) -> bool:
        """Write a checkpoint of `position`; False, with the reason in the log, where it failed.

        A failure is tried again later, and training goes on meanwhile.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it failed many times in a row.
        """
        try:
            ledger_bytes = self._write(position, write_files)
        except (CheckpointError, OSError) as error:
            self._failed(error)
            return False
        self._failures = 0
        self._retry_at = 0.0
        self._ledger_bytes = ledger_bytes
        self._saved_step = position.step
        self._sequence += 1
        self.acknowledgements.checkpoint_is_durable()
        self._prune(recorded=position.recorded is not None)
        return True

    def acknowledge(self) -> None:
        """Acknowledge what may be acknowledged.

        Raises:
            LeaseLost: another trainer took over.
        """
        if entries := self.acknowledgements.releasable():
            self._bus.lease.acknowledge(self._lease, entries)
            self.acknowledgements.released(entries)

    def _cut_ledger(self, state: TrainerState | None) -> int:
        """Cut the ledger to the size that the checkpoint remembers; returns its size now.

        Lines of a checkpoint that was never finished go. A ledger that is shorter than that, or
        has other bytes, is written anew from the checkpoint.
        """
        size_bytes = state.ledger_bytes if state else 0
        short = self._ledger.cut(size_bytes)
        if not short and (state is None or not self._ledger_differs(state)):
            return size_bytes
        log.error(
            "the ledger is not what the checkpoint remembers; writing it anew from it",
            path=str(self._ledger.path),
            missing_bytes=short,
        )
        return self._ledger.rewrite(self.acknowledgements.settled.lines(self._saved_step))

    def _ledger_differs(self, state: TrainerState) -> bool:
        return ledger_differs(self._ledger.path, state.ledger_bytes, state.ledger_digest)

    def _many_bytes_unsaved(self) -> bool:
        # Half of the bound: what a checkpoint settles waits for the one after it while as much
        # again gathers.
        unsaved_bytes = self.acknowledgements.unsaved_bytes * STREAM_OVERHEAD
        return unsaved_bytes >= self._max_unacked_bytes / 2

    def _write(self, position: TrainerPosition, write_files: Callable[[Path], None]) -> int:
        """Write the ledger, then the checkpoint; returns the ledger's size in bytes.

        In this order: a kill between the two leaves ledger lines that no checkpoint knows, and the
        next trainer cuts them off. The other way round their fates would be missing for good.
        """
        # The folder first: where it is missing beside a ledger with lines, it was lost.
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._bus.lease.writing(self._lease):
            self._ledger.cut(self._ledger_bytes)  # an attempt that failed may have left its lines
            ledger_bytes = self._ledger.append(self.acknowledgements.unsaved_lines)
        state = TrainerState(
            sequence=self._sequence + 1,
            step=position.step,
            policy=position.policy,
            issued=position.issued,
            settled=self.acknowledgements.settled.ranges(),
            before=self.acknowledgements.in_newest_checkpoint,
            ledger_bytes=ledger_bytes,
            totals=self.totals,
            requeued=self.requeued,
            dropped=position.dropped,
            recorded=position.recorded,
            journal=position.journal,
            ledger_digest=digest_of(self._ledger.path, ledger_bytes),
        )
        # The model takes its time. Only the rename is fenced: a trainer whose lease has passed to
        # another one meanwhile must not put its checkpoint among the successor's.
        checkpoint.save(
            self._directory, state, write_files, fence=lambda: self._bus.lease.writing(self._lease)
        )
        return ledger_bytes

    def _prune(self, *, recorded: bool) -> None:
        """Remove old checkpoints. A recorded run's keep their optimizer: a replay starts there."""
        with self._bus.lease.writing(self._lease):
            checkpoint.prune(
                self._directory,
                self._settings.keep,
                self._settings.keep_every,
                keep_optimizer=recorded,
            )

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        with self._bus.lease.writing(self._lease):
            self._ledger.cut(self._ledger_bytes)
        pause_s = retry_after_s(self._failures)
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
