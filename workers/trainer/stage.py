"""The stage `train`, as the worker loop drives it: a thin shell around the trainer.

How a trainer starts is here too: it takes the run's lease, resumes the run, and its parts are put
together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from onstream.pipeline.redis.bus import Bus, redis_url
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.ownership import Ownership
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.telemetry import get_logger
from onstream.settings.plan import Plan, make_plan
from onstream.settings.root import Settings
from onstream.settings.stages import StageName
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.checkpoint import Checkpoint
from onstream.workers.trainer.durability.checkpointing import Checkpointing
from onstream.workers.trainer.durability.operator_requests import OperatorRequestHandler
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.durability.resume import agree_on_plan, become_trainer
from onstream.workers.trainer.durability.run_directory import RunDirectory
from onstream.workers.trainer.evaluations import Evaluations
from onstream.workers.trainer.metrics_files import MetricsFiles
from onstream.workers.trainer.publication.policy_probe import prober
from onstream.workers.trainer.publication.publisher import Publisher, nccl_transfer, student_files
from onstream.workers.trainer.recovery import Recovery
from onstream.workers.trainer.tickets import TicketIssuer, TicketPlanner
from onstream.workers.trainer.trainer import Trainer
from onstream.workers.trainer.training import Training, learner_at

log = get_logger()


class TrainerStage:
    """The stage `train`. It holds its entries: checkpoints acknowledge them, no hop moves them on.

    Consumes rollouts and tombstones. Waits for the stages of the route to be ready, then for a
    batch of complete units. Is unblocked by the entry that completes the last of them. Produces
    tickets, policy versions, checkpoints and metrics.
    """

    name: StageName = "train"
    holds_entries = True

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self._settings = settings
        self._bus = bus
        self._trainer: Trainer | None = None
        self.stats = Stats(detail="starting")

    def setup(self) -> None:
        """Become the run's trainer, resume it, and publish its weights.

        Raises:
            UserError: another trainer has the run, the settings are not the run's, the student
                cannot be loaded, or the disk is full.
        """
        self._trainer = start_trainer(self._settings, self._bus, self.stats)

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
        """Take `new` and do one slice of work. Returns no outcomes: entries are held.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so.
        """
        self.trainer.handle(new)
        self._update_stats()
        return []

    def close(self, *, finished: bool) -> None:
        """Checkpoint what is not durable yet, and close the files."""
        self.trainer.close()

    def _update_stats(self) -> None:
        """Put into the heartbeat what the trainer does or waits for."""
        self.stats.detail = status_text(self.trainer, self._settings.orchestrator.batch_size)
        # A new dictionary each time: the heartbeat's thread reads it while this one goes on.
        self.stats.numbers = self.trainer.numbers()


def status_text(trainer: Trainer, batch_size: int) -> str:
    """What `trainer` does or waits for, in words."""
    training = trainer.training
    if trainer.finished:
        return f"finished after step {training.step}"
    if trainer.tickets.waits_for:
        return f"waits for {trainer.tickets.waits_for}"
    if trainer.checkpointing.stalled:
        return "waits for a checkpoint: none could be written, see the log"
    missing = training.batches.missing()
    return (
        f"step {training.step + 1} of {training.max_steps}; "
        f"{sum(missing.values())} rollouts of {len(missing)} open groups to come"
        f"{_none_right(training, batch_size)}"
    )


def _none_right(training: Training, batch_size: int) -> str:
    """A warning where a batch's worth of completions came and none was right enough to train on."""
    wrong = training.dropped["not_verified"]
    verified_alone = training.batches.rules.least_reward is not None
    if not verified_alone or training.batches.complete_units or wrong < batch_size:
        return ""
    return (
        f"; none of the {wrong} completions since the last step was right, "
        'and keep = "verified" trains on no others'
    )


def start_trainer(settings: Settings, bus: Bus, stats: Stats) -> Trainer:
    """Become the run's trainer, and resume it from its newest whole checkpoint.

    `stats` is what the trainer tells of itself in its heartbeat.

    Raises:
        UserError: another trainer has the run, the settings are not the run's, the student cannot
            be loaded, or the disk is full.
    """
    plan = make_plan(settings)
    files = Ownership(settings.run_dir)
    lease = become_trainer(bus, settings.delivery.lease, files)
    with bus.lease.writing(lease):
        found = checkpoint.load_newest(settings.run_dir / checkpoint.FOLDER)
        agree_on_plan(bus, lease, plan, settings, found.state if found else None)
    directory = RunDirectory(bus, lease, files, settings.run_dir)
    with contextlib.ExitStack() as opened:
        trainer = _Builder(settings, plan, bus, lease, directory, found, opened).build(stats)
        trainer.begin()
        opened.pop_all()  # from here on the trainer closes them
    return trainer


@dataclass(frozen=True)
class _Builder:
    """Builds a trainer at the checkpoint `found`; `opened` closes parts if a later one fails."""

    settings: Settings
    plan: Plan
    bus: Bus
    lease: Lease
    directory: RunDirectory
    found: Checkpoint | None
    opened: contextlib.ExitStack

    def build(self, stats: Stats) -> Trainer:
        training = self._training()
        with self.directory.changing():
            checkpointing = self._checkpointing()
            planner = self._ticket_planner(checkpointing.requeued)
            acknowledgements = checkpointing.acknowledgements
            requests = OperatorRequestHandler(
                self.bus, self.lease, self.directory.path, acknowledgements, planner
            )
            metrics = self._metrics(training.step)
            publisher = self._publisher(training)
            # The weights of the checkpoint were announced before, as a rule: then this announces
            # nothing. It does where the run is new, or Redis has lost its data.
            policy = publisher.publish(training.step, training.learner.published_state())
            recording = self._recording(policy.digest)
        evaluations = self._evaluations()
        tickets = self._ticket_issuer(planner, acknowledgements, requests)
        recovery = Recovery(
            self.bus,
            self.lease,
            self.plan,
            self.directory,
            training,
            tickets,
            acknowledgements,
            requests,
            publisher,
            evaluations,
        )
        return Trainer(
            settings=self.settings,
            bus=self.bus,
            lease=self.lease,
            directory=self.directory,
            training=training,
            tickets=tickets,
            checkpointing=checkpointing,
            requests=requests,
            publisher=publisher,
            policy=policy,
            recording=recording,
            metrics=metrics,
            evaluations=evaluations,
            recover=recovery.run,
            stats=stats,
        )

    def _training(self) -> Training:
        state = self.found.state if self.found else None
        training = Training(
            self.settings,
            learner_at(self.settings, self.found),
            worker=self.bus.consumer,
            step=state.step if state else 0,
            dropped=state.dropped if state else None,
            images=self.bus.images.read,
        )
        self.opened.callback(training.close)
        if self.found:
            log.info(
                "resuming",
                checkpoint=str(self.found.path),
                step=self.found.state.step,
                issued=self.found.state.issued,
            )
        return training

    def _checkpointing(self) -> Checkpointing:
        return Checkpointing(
            self.bus,
            self.lease,
            self.directory.path,
            self.settings.checkpoint,
            self.found.state if self.found else None,
        )

    def _ticket_planner(self, requeued: dict[int, int]) -> TicketPlanner:
        orchestrator = self.settings.orchestrator
        return TicketPlanner(
            seed=self.settings.run.seed,
            group_size=orchestrator.group_size,
            batch_size=orchestrator.batch_size,
            max_off_policy_steps=orchestrator.max_off_policy_steps,
            max_steps=self.settings.trainer.max_steps,
            route=self.plan.route,
            requeued=requeued,
        )

    def _ticket_issuer(
        self,
        planner: TicketPlanner,
        acknowledgements: Acknowledgements,
        requests: OperatorRequestHandler,
    ) -> TicketIssuer:
        return TicketIssuer(
            self.bus,
            self.lease,
            planner,
            acknowledgements,
            issue_requeued=requests.issue_requeued,
            streams=self.plan.streams,
            max_backlog=self.settings.orchestrator.max_backlog,
            issued=self.found.state.issued if self.found else 0,
        )

    def _metrics(self, step: int) -> MetricsFiles:
        metrics = MetricsFiles(self.settings, step)
        self.opened.callback(metrics.close)
        return metrics

    def _publisher(self, training: Training) -> Publisher:
        publisher = Publisher(
            self.bus,
            self.lease,
            self.settings,
            student_files(self.directory.path, training.learner),
            nccl_transfer(self.bus, self.lease, self.settings),
            prober(training.learner, self.settings.inference),
        )
        self.opened.callback(publisher.close)
        return publisher

    def _recording(self, digest: str) -> Recording:
        recording = Recording(self.settings, self.found, digest, self.bus.images.read)
        self.opened.callback(recording.close)
        return recording

    def _evaluations(self) -> Evaluations | None:
        if not self.settings.eval.interval:
            return None
        evaluations = Evaluations(self.settings, redis_url(self.settings), self.directory.path)
        self.opened.callback(evaluations.close)
        return evaluations
