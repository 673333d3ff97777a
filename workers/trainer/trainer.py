"""The trainer at work, and the stage `train` by which the worker loop drives it.

It issues tickets, trains on what comes back, publishes weights, takes checkpoints, and gives every
number a fate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onstream.pipeline.records import PolicyVersion, Rollout, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.ledger import Settled
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.settings.stages import StageName
from onstream.workers.trainer.batches.train_samples import reward_out_of_bounds
from onstream.workers.trainer.checkpoints import Checkpoints
from onstream.workers.trainer.durability.checkpointing import Checkpointing
from onstream.workers.trainer.durability.operator_requests import OperatorRequestHandler
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.durability.refused_rollouts import write_dead_letters
from onstream.workers.trainer.durability.run_directory import RunDirectory
from onstream.workers.trainer.evaluations import Evaluations
from onstream.workers.trainer.metrics_files import MetricsFiles, StepClock
from onstream.workers.trainer.publication.publisher import Publisher
from onstream.workers.trainer.status_text import status_text
from onstream.workers.trainer.step_output import StepOutput
from onstream.workers.trainer.tickets import TicketIssuer
from onstream.workers.trainer.training import StepResult, Training, drops_in_a_row

log = get_logger()
READ_AHEAD = 256  # records


@dataclass(kw_only=True, eq=False)
class Trainer:
    """The trainer of a run that is open, put together by `onstream.workers.trainer.startup`.

    What is considered is written to the run's journal before a step can depend on it. What is
    settled is acknowledged when the journal is durable.
    """

    settings: Settings
    bus: Bus
    lease: Lease
    directory: RunDirectory
    training: Training
    tickets: TicketIssuer
    checkpointing: Checkpointing
    requests: OperatorRequestHandler
    publisher: Publisher
    start_policy: PolicyVersion
    recording: Recording
    metrics: MetricsFiles
    evaluations: Evaluations | None
    recover: Callable[[PolicyVersion], None]
    stats: Stats
    clock: StepClock = field(default_factory=StepClock)
    finished: bool = False

    def __post_init__(self) -> None:
        self.output = StepOutput(
            directory=self.directory,
            learner=self.training.learner,
            publisher=self.publisher,
            recording=self.recording,
            metrics=self.metrics,
            evaluations=self.evaluations,
            policy=self.start_policy,
            completed=self._settle_step,
            clock=self.clock,
        )
        self.checkpoints = Checkpoints(
            directory=self.directory,
            training=self.training,
            output=self.output,
            tickets=self.tickets,
            checkpointing=self.checkpointing,
            recording=self.recording,
            requests=self.requests,
            metrics=self.metrics,
            max_dead=self.settings.delivery.max_dead,
        )
        self._drops = drops_in_a_row(self.settings.orchestrator)

    @property
    def step(self) -> int:
        """How many steps are taken."""
        return self.training.step

    @property
    def policy(self) -> PolicyVersion:
        """The newest version that is announced."""
        return self.output.policy

    @property
    def run_ended(self) -> bool:
        """Whether every step is taken; what is settled may not be durable yet."""
        return self.step >= self.training.max_steps

    def begin(self) -> None:
        """Settle and reissue what got lost before this trainer; reopen a run that goes on."""
        self.recover(self.policy)
        # A run that has ended is resumed for its purges alone.
        self.requests.poll(self.step + 1)
        if not self.run_ended and self.bus.state.finished():
            self.bus.lease.reopen(self.lease)
        self.clock.restart()

    @property
    def room(self) -> int:
        """How many more records to read: none while a batch waits, nor while none could come.

        What the journal has comes before what Redis has: so the order is the same again.
        """
        expects_more = self.tickets.outstanding > 0 and not self.finished
        wants_more = self.training.batch is None and not self.recording.stalled
        return READ_AHEAD if expects_more and wants_more and not self._takes_again else 0

    @property
    def busy(self) -> bool:
        """Whether there is work to do without new records."""
        ready = self.output.ready or self.checkpoints.ready
        return self._can_step or ready or self._takes_again

    @property
    def _can_step(self) -> bool:
        """Whether a batch waits to be trained."""
        stalled = self.checkpointing.stalled or self.recording.stalled
        return self.training.batch is not None and not stalled

    @property
    def _takes_again(self) -> bool:
        """Whether the journal has records that the trainer before this one had considered."""
        waiting = self.recording.unsettled.waiting and self.training.batch is None
        return waiting and not self.recording.stalled and not self.run_ended

    def handle(self, new: Sequence[Delivery]) -> None:
        """Take `new`, take at most one step, issue tickets, and checkpoint where it is due.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so; or nothing that comes can be trained on.
        """
        self.output.collect()
        self.checkpoints.collect()
        if self.bus.lease.may_have_lost_data:
            words = "redis was restarted, replaced or emptied; looking for what it has lost"
            log.warning(words, step=self.step, issued=self.tickets.issued)
            self.output.complete()
            self.recover(self.policy)
        self._take(new)
        if self._takes_again:
            for record, taken in self.recording.unsettled.take(READ_AHEAD):
                self.training.take(record, taken)
        self._advance()
        if self._can_step:
            self._take_step()
            self._advance()
        self._stop_where_nothing_trains()
        if not self.output.pending:
            self._write_requested_weights()
            self.publisher.mend(self.policy)
        self.requests.poll(self.step + 1)
        self._issue_tickets()
        if self.checkpointing.due(self.step, self.training.max_steps, full=self.bus.lease.full):
            self._checkpoint()
        self._acknowledge()
        self._finish()

    def close(self) -> None:
        """Checkpoint what is not durable yet, and close the files.

        Entries stay pending for the next trainer: a drain gives nothing back.
        """
        self.output.complete()
        self.checkpoints.complete()
        if self.checkpointing.unsaved(self.step):
            self._checkpoint()
            self.checkpoints.complete()
            self._acknowledge()
        self.training.close()
        self.metrics.close()
        self.recording.close()
        self.publisher.close()
        if self.evaluations:
            self.evaluations.close()

    def _take(self, new: Sequence[Delivery]) -> None:
        acknowledgements = self.checkpointing.acknowledgements
        for delivery in new:
            record = delivery.record
            if isinstance(record, Rollout | Tombstone) and acknowledgements.take(delivery):
                self.training.take(record, delivery.taken)

    def _advance(self) -> None:
        """Consider records up to a complete batch.

        They are written to the journal here, before the step that depends on them. Where the disk
        has no room, training waits for it.
        """
        self._write_journal()
        if self.recording.stalled:
            return
        with self.directory.appending():
            result = self.training.advance()
            for timed in result.considered:
                self.recording.record(timed.record, timed.taken)
        self._write_journal()
        self._write_dead_letters(result.refused)
        self._settle(result.settled)
        self._drops.consider(timed.record for timed in result.considered)
        can_train = self.training.batch is not None or self.training.batches.complete_units > 0
        self._drops.settle(result.settled, can_train=can_train)

    def _write_journal(self) -> None:
        with self.directory.appending():
            written = self.recording.write()
        self.checkpointing.acknowledgements.journalled(written)

    def _settle(self, settled: Sequence[Settled]) -> None:
        self.checkpointing.acknowledgements.settle(settled)
        self.recording.settle(settled)

    def _acknowledge(self) -> None:
        """Acknowledge what the journal holds durably, or a checkpoint before the newest one."""
        with self.directory.appending():
            self.recording.remove_unsettled()
            durable = self.recording.durable
        self.checkpointing.acknowledgements.journal_is_durable(durable)
        self.checkpointing.acknowledge()

    def _write_dead_letters(self, reasons: Mapping[int, str]) -> None:
        if reasons:
            with self.directory.changing():
                write_dead_letters(self.bus, self.checkpointing.acknowledgements, reasons)

    def _stop_where_nothing_trains(self) -> None:
        """End a run that would generate for ever.

        The checkpoint comes first: without it the run, once mended, would take the same rollouts
        again and stop again.
        """
        if problem := self._drops.problem:
            self._checkpoint()
            self.checkpoints.complete()
            self._acknowledge()
            raise problem

    def _take_step(self) -> None:
        """Take one step, and start to publish its weights.

        A checkpoint waits for the weights: it never names a version that nobody could load. After a
        kill in between, the next trainer takes the step again and announces nothing: its digest is
        known.
        """
        self.clock.start_step()
        result = self.training.take_step(give_up=self._write_dead_letters)
        self.clock.learned()
        self.stats.begin_phase()
        self.output.publish(self.step, result)
        self.stats.begin_phase()

    def _settle_step(self, result: StepResult, row: dict[str, Any]) -> None:
        """Settle the rollouts of a step whose weights are out, and count them.

        Not before: the tickets that take their places may ask for these weights.
        """
        self._settle(result.settled)
        self._drops.settle(result.settled, can_train=True)
        self.checkpointing.count(row)
        self.stats.done += int(row["rollouts"])
        self.stats.dead += int(row["dead"])

    def _write_requested_weights(self) -> None:
        if self.publisher.file_requested:
            with self.directory.changing():
                self.publisher.write_file()

    def _issue_tickets(self) -> None:
        """Issue what is due after the newest version that is out: tickets may ask for it."""
        was_open = self.tickets.opened
        self.tickets.issue(self.policy.number)
        if self.tickets.opened and not was_open:
            self.clock.restart()  # start-up is neither training nor waiting for data

    def _finish(self) -> None:
        if self.run_ended and not self.finished and self.checkpointing.saved(self.step):
            self.bus.lease.finish(self.lease)
            self.finished = True

    def _checkpoint(self) -> None:
        """Take a checkpoint; at the end of the run, wait for it."""
        self.stats.begin_phase()
        self.checkpoints.take()
        if self.run_ended:
            self.checkpoints.complete()
        self.stats.begin_phase()
        self.clock.start_waiting()


class TrainerStage:
    """The stage `train`. It holds its entries: checkpoints acknowledge them, no hop moves them on.

    Consumes rollouts and tombstones. Waits for the stages of the route to be ready, then for a
    batch of complete units. Is unblocked by the entry that completes the last of them. Produces
    tickets, policy versions, checkpoints and metrics.
    """

    name: StageName = "train"
    holds_entries = True

    def __init__(
        self, settings: Settings, bus: Bus, start: Callable[[Settings, Bus, Stats], Trainer]
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._start = start
        self._trainer: Trainer | None = None
        self.stats = Stats(detail="starting")

    def setup(self) -> None:
        """Become the run's trainer, resume it, and publish its weights.

        Raises:
            UserError: another trainer has the run, the settings are not the run's, the student
                cannot be loaded, or the disk is full.
        """
        self._trainer = self._start(self._settings, self._bus, self.stats)

    @property
    def trainer(self) -> Trainer:
        """The trainer at work, after `setup`."""
        assert self._trainer is not None, "setup() comes first"
        return self._trainer

    @property
    def room(self) -> int:
        """How many more records the trainer wants now."""
        return self.trainer.room

    @property
    def busy(self) -> bool:
        """Whether a batch waits to be trained."""
        return self.trainer.busy

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Take `new` and do one slice of work.

        Returns outcomes for what it refuses alone: the other entries are held.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so.
        """
        refused = []
        taken = []
        verification = self._settings.orchestrator.verification
        for delivery in new:
            if reason := reward_out_of_bounds(delivery.record, verification):
                refused.append(Outcome(delivery, dead=reason))
            else:
                taken.append(delivery)
        self.trainer.handle(taken)
        self._update_stats()
        return refused

    def close(self, *, finished: bool) -> None:
        """Checkpoint what is not durable yet, and close the files."""
        self.trainer.close()

    def _update_stats(self) -> None:
        trainer = self.trainer
        self.stats.detail = status_text(
            trainer.training,
            trainer.tickets,
            trainer.recording,
            trainer.checkpointing,
            finished=trainer.finished,
        )
        # A new dictionary each time: the heartbeat's thread reads it while this one goes on.
        self.stats.numbers = {
            "step": trainer.step,
            "issued": trainer.tickets.issued,
            "outstanding": trainer.tickets.outstanding,
            "unacked_bytes": trainer.checkpointing.acknowledgements.unacked_bytes,
        }
