"""When checkpoints are taken, what follows from one, and what happens while none can be written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.durable import hash_of_first
from onstream.pipeline.run_files.ledger import LEDGER, Ledger, Settled, encoded, ledger_differs
from onstream.pipeline.run_files.recording import JournalMark
from onstream.pipeline.telemetry import get_logger
from onstream.settings.devices import available_host_bytes
from onstream.settings.record_sizes import STREAM_OVERHEAD
from onstream.settings.sections.trainer import CheckpointSettings
from onstream.workers.trainer.background import BACKGROUND_BYTES, BackgroundTask
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import CheckpointError, TrainerState
from onstream.workers.trainer.durability.run_directory import (
    FAILURES_ALLOWED,
    disk_error,
    retry_after_s,
)

MEMORY_SHARE = 0.8
"""The part of the host's free memory that the copy of a checkpoint may take."""

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


class Snapshot(Protocol):
    """What of the training a checkpoint holds: the model, the optimizer and its random state."""

    @property
    def size_bytes(self) -> int:
        """What a copy takes."""
        ...

    def copy(self) -> None:
        """Copy what the next update of the weights changes."""
        ...

    def write(self, directory: Path) -> None:
        """Write its files into `directory`."""
        ...


class CheckpointTask(BackgroundTask[None]):
    """Writes a checkpoint of `position`."""

    name = "onstream-checkpoint"

    def __init__(
        self,
        position: TrainerPosition,
        write: Callable[[Callable[[], None]], None],
        wake: Callable[[], None] | None,
    ) -> None:
        self.position = position
        super().__init__(write, wake)


class Checkpointing:
    """Takes a run's checkpoints, and keeps its ledger and its acknowledgements in step with them.

    A large one is written in a thread while training goes on; at most one at a time. What follows
    from it is done by `collect`.

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
        self._task: CheckpointTask | None = None
        self._failures = 0
        self._retry_at = 0.0
        self.acknowledgements = Acknowledgements(state)
        self.totals: dict[str, float] = dict(state.totals) if state else {}
        self.requeued: dict[int, int] = dict(state.requeued) if state else {}
        self._ledger = Ledger(run_dir / LEDGER)
        self._ledger_bytes = self._cut_ledger(state)
        # Carried on, and not read from the file again: that takes longer with every checkpoint,
        # and would agree to whatever the file holds by then.
        self._ledger_hash = hash_of_first(self._ledger.path, self._ledger_bytes)
        self._next_ledger_hash = self._ledger_hash

    def count(self, row: Mapping[str, Any]) -> None:
        """Add a step's metrics `row` to the totals."""
        for name in ("rollouts", "tokens", "step_s"):
            self.totals[name] = self.totals.get(name, 0) + row[name]

    def saved(self, step: int) -> bool:
        """Whether a durable checkpoint holds all there is at `step`."""
        return self._sequence > 0 and self._task is None and not self.unsaved(step)

    def unsaved(self, step: int) -> bool:
        """Whether there is anything at `step` that no checkpoint holds, not even one under way."""
        return step != self._newest_step or bool(self.acknowledgements.unsaved_lines)

    def due(self, step: int, max_steps: int, *, full: bool) -> bool:
        """Whether to take a checkpoint at `step`: by the interval, at the end, or for the bytes.

        While Redis is `full`, any bytes that wait for a checkpoint will do: what one settles is
        acknowledged by the next.
        """
        if time.monotonic() < self._retry_at:
            return False
        interval = self._settings.interval
        at_end = step >= max_steps and not self.saved(step)
        by_interval = step // interval > self._newest_step // interval
        by_bytes = full and not self.pending and self.acknowledgements.waiting_bytes > 0
        return at_end or by_interval or by_bytes or self._many_bytes_unsaved()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._task is not None

    @property
    def ready(self) -> bool:
        """Whether the one that was under way is durable, or has failed; `collect` says which."""
        return self._task is not None and self._task.done

    @property
    def stalled(self) -> bool:
        """Whether to train no more: checkpoints fail, and what waits for one is at its bound."""
        waiting_bytes = self.acknowledgements.waiting_bytes * STREAM_OVERHEAD
        return self._failures > 0 and waiting_bytes >= self._max_unacked_bytes

    def start(self, position: TrainerPosition, snapshot: Snapshot) -> None:
        """Start to write a checkpoint of `position`; a small one is written on return.

        The one before must have been collected. The learner's tensors must not change before
        `wait_until_copied`.
        """
        assert self._task is None, "one checkpoint at a time"
        added = self.acknowledgements.checkpoint_begins()
        lines = encoded(added)
        self._next_ledger_hash = self._ledger_hash.copy()
        self._next_ledger_hash.update(lines)
        # All that the main thread goes on to change is copied here.
        state = TrainerState(
            sequence=self._sequence + 1,
            step=position.step,
            policy=position.policy,
            issued=position.issued,
            settled=self.acknowledgements.settled.ranges(),
            before=self.acknowledgements.in_newest_checkpoint,
            ledger_bytes=self._ledger_bytes + len(lines),
            ledger_digest=self._next_ledger_hash.hexdigest(),
            totals=dict(self.totals),
            requeued=dict(self.requeued),
            dropped=position.dropped,
            recorded=position.recorded,
            journal=position.journal,
        )

        in_background = _in_background(snapshot.size_bytes)

        def write(copied: Callable[[], None]) -> None:
            if in_background:
                snapshot.copy()
            copied()
            self._write(state, added, snapshot.write)

        wake = self._bus.connection.unblock if in_background else None
        self._task = CheckpointTask(position, write, wake)

    def wait_until_copied(self) -> None:
        """Wait until a checkpoint under way reads the learner's tensors no more."""
        if self._task is not None:
            self._task.wait_until_copied()

    def collect(self) -> TrainerPosition | None:
        """The position of the checkpoint under way once it is durable; waits for it.

        None, with the reason in the log, where it failed: it is tried again later, and training
        goes on meanwhile.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it failed many times in a row.
        """
        task = self._task
        assert task is not None, "start() comes first"
        task.wait()
        self._task = None
        try:
            task.result()
        except (CheckpointError, OSError) as error:
            self._failed(error)
            return None
        self._failures = 0
        self._retry_at = 0.0
        self._ledger_bytes = self._ledger.size_bytes
        self._ledger_hash = self._next_ledger_hash
        self._saved_step = task.position.step
        self._sequence += 1
        self.acknowledgements.checkpoint_is_durable()
        log.info("checkpoint", step=self._saved_step, seconds=round(task.seconds, 3))
        return task.position

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

    @property
    def _newest_step(self) -> int:
        """The step of the newest checkpoint, be it under way."""
        return self._saved_step if self._task is None else self._task.position.step

    def _write(
        self, state: TrainerState, added: list[Settled], write_files: Callable[[Path], None]
    ) -> None:
        """Write a checkpoint with `state`, which adds the lines `added` to the ledger."""
        # The folder first: where it is missing beside a ledger with lines, it was lost.
        self._directory.mkdir(parents=True, exist_ok=True)
        # The model takes its time. Only what others see is fenced: a trainer whose lease has passed
        # to another one meanwhile must not put its checkpoint among the successor's.
        checkpoint.save(self._directory, state, write_files, fence=lambda: self._naming(added))
        self._prune(recorded=state.recorded is not None)

    @contextmanager
    def _naming(self, added: list[Settled]) -> Iterator[None]:
        """The fence in which a checkpoint gets its name; the lines `added` are in the ledger then.

        In this order: a kill between the two leaves ledger lines that no checkpoint knows, and the
        next trainer cuts them off. The other way round their fates would be missing for good.
        """
        with self._bus.lease.writing(self._lease):
            self._ledger.cut(self._ledger_bytes)  # an attempt that failed may have left its lines
            self._ledger.append(added)
            yield

    def _prune(self, *, recorded: bool) -> None:
        """Remove old checkpoints. A recorded run's keep their optimizer: a replay starts there."""
        try:
            with self._bus.lease.writing(self._lease):
                checkpoint.prune(
                    self._directory,
                    self._settings.keep,
                    self._settings.keep_every,
                    keep_optimizer=recorded,
                )
        except OSError as error:  # the new one stands all the same
            log.warning("old checkpoints could not be removed", problem=str(error))

    def _failed(self, error: Exception) -> None:
        self.acknowledgements.checkpoint_failed()
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


def _in_background(size_bytes: int) -> bool:
    """Whether a checkpoint of `size_bytes` is copied, and written while training goes on."""
    if size_bytes < BACKGROUND_BYTES:
        return False
    available_bytes = available_host_bytes()
    if size_bytes <= MEMORY_SHARE * available_bytes:
        return True
    log.warning(
        "no memory for a copy of the checkpoint; training waits while it is written",
        copy_bytes=size_bytes,
        available_bytes=available_bytes,
    )
    return False
