"""When a checkpoint is taken: what comes before it, and what follows once it is durable."""

from __future__ import annotations

from dataclasses import dataclass

from onstream.workers.trainer.durability.checkpointing import Checkpointing, TrainerPosition
from onstream.workers.trainer.durability.operator_requests import OperatorRequestHandler
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.durability.run_directory import RunDirectory
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from onstream.workers.trainer.metrics_files import MetricsFiles
from onstream.workers.trainer.step_output import StepOutput
from onstream.workers.trainer.tickets import TicketIssuer
from onstream.workers.trainer.training import Training


@dataclass(kw_only=True, eq=False)
class Checkpoints:
    """Takes a trainer's checkpoints.

    A large one is written while training goes on. It is durable, or has failed, before the next one
    begins. The metrics of steps say how long the trainer stood still for them.
    """

    directory: RunDirectory
    training: Training
    output: StepOutput
    tickets: TicketIssuer
    checkpointing: Checkpointing
    recording: Recording
    requests: OperatorRequestHandler
    metrics: MetricsFiles
    max_dead: int

    def __post_init__(self) -> None:
        # Only the optimizer's step changes what a checkpoint copies.
        self.training.learner.before_update(self._wait_until_copied)

    @property
    def ready(self) -> bool:
        """Whether `collect` has something to do."""
        return self.checkpointing.ready

    def take(self) -> None:
        """Start a checkpoint; a small one is done on return. It is tried again where it fails.

        It waits for the weights of the last step: it never names a version that nobody could load.
        None is taken while the journal lacks what has settled.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so.
        """
        with self.output.clock.checkpointing():
            self.complete()
            self.output.complete()
            if self._write_journal():
                self.checkpointing.start(self._position(), LearnerSnapshot(self.training.learner))
                self.collect()

    def collect(self) -> None:
        """Do what follows from the checkpoint under way, if it is durable.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it failed many times in a row.
        """
        if self.ready:
            self.complete()

    def complete(self) -> None:
        """The same for the checkpoint under way, if there is one; waits for it.

        Raises:
            LeaseLost: another trainer took over.
            UserError: it failed many times in a row.
        """
        if not self.checkpointing.pending:
            return
        position = self.checkpointing.collect()
        if position is not None:
            with self.directory.changing():
                self.recording.checkpoint_is_durable(position.journal)
                self.requests.checkpoint_is_durable()
                self.requests.spill_dead_letters(self.max_dead)

    def _write_journal(self) -> bool:
        """Make what the checkpoint refers to durable; False where the disk has no room."""
        with self.directory.appending():
            written = self.recording.write()
        self.checkpointing.acknowledgements.journalled(written)
        if self.recording.stalled:
            return False
        with self.directory.changing():
            self.metrics.sync()
            self.recording.sync()
        return True

    def _position(self) -> TrainerPosition:
        self.requests.checkpoint_begins()
        return TrainerPosition(
            step=self.training.step,
            policy=self.output.policy,
            issued=self.tickets.issued,
            dropped=dict(self.training.dropped),
            recorded=self.recording.recorded,
            journal=self.recording.mark,
        )

    def _wait_until_copied(self) -> None:
        if self.checkpointing.pending:
            with self.output.clock.waiting_for_checkpoint():
                self.checkpointing.wait_until_copied()
