"""How a trainer starts: it takes the run's lease, resumes the run, and puts its parts together."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from onstream.pipeline.models.learning_rate import with_learning_rate
from onstream.pipeline.models.loading import base_of
from onstream.pipeline.models.tokenizer import load_configs
from onstream.pipeline.redis.bus import Bus, redis_url
from onstream.pipeline.redis.dead_letters import dead_numbers
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.ownership import Ownership
from onstream.pipeline.stage import Stats
from onstream.pipeline.telemetry import get_logger
from onstream.settings.plan import Plan, make_plan
from onstream.settings.record_sizes import max_backlog, max_unacked_bytes
from onstream.settings.root import Settings
from onstream.settings.route import taught_by_own_start
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
from onstream.workers.trainer.publication.publisher import (
    Publisher,
    nccl_transfer,
    packer_of,
    student_files,
)
from onstream.workers.trainer.recovery import Recovery
from onstream.workers.trainer.teachers import AbsentTeachers, teacher_choice
from onstream.workers.trainer.tickets import TicketIssuer, TicketPlanner
from onstream.workers.trainer.trainer import Trainer, TrainerStage
from onstream.workers.trainer.training import Training, learner_at

log = get_logger()


def trainer_stage(settings: Settings, bus: Bus) -> TrainerStage:
    """The stage `train`, whose `setup` starts the trainer."""
    return TrainerStage(settings, bus, start_trainer)


def start_trainer(settings: Settings, bus: Bus, stats: Stats) -> Trainer:
    """Become the run's trainer, and resume it from its newest whole checkpoint.

    `stats` is what the trainer tells of itself in its heartbeat.

    Raises:
        UserError: another trainer has the run, the settings are not the run's, the student cannot
            be loaded, or the disk is full.
    """
    files = Ownership(settings.run_dir)
    lease = become_trainer(bus, settings.delivery.lease, files)
    with bus.lease.writing(lease):
        found = checkpoint.load_newest(settings.run_dir / checkpoint.FOLDER)
        settings = _with_learning_rate(settings, found)
        state = found.state if found else None
        plan = agree_on_plan(bus, lease, make_plan(settings), settings, state)
    directory = RunDirectory(bus, lease, files, settings.run_dir)
    with contextlib.ExitStack() as opened:
        trainer = _Builder(settings, plan, bus, lease, directory, found, opened).build(stats)
        trainer.begin()
        opened.pop_all()  # from here on the trainer closes them
    return trainer


def _with_learning_rate(settings: Settings, found: Checkpoint | None) -> Settings:
    """`settings` with the number that `trainer.optim.lr = "auto"` means for the student.

    Raises:
        UserError: there is no such student.
    """
    if settings.trainer.optim.lr != "auto":
        return settings
    start = found.path if found else settings.model.name
    config, _ = load_configs(base_of(start) or start)
    own = taught_by_own_start(settings)
    trainer = with_learning_rate(settings.trainer, config.to_dict(), from_own_start=own)
    return settings.model_copy(update={"trainer": trainer})


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
            policy = publisher.publish(training.step, training.learner.live_state())
            recording = self._recording(policy.digest)
            acknowledgements.take_from_journal(recording.unsettled.numbers)
        evaluations = self._evaluations()
        tickets = self._ticket_issuer(planner, acknowledgements, requests)
        tickets.count_as_issued(recording.unsettled.numbers)
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
            start_policy=policy,
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
            max_unacked_bytes=max_unacked_bytes(self.settings),
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
            teacher_of=teacher_choice(self.settings),
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
            max_backlog=max_backlog(self.settings),
            issued=self.found.state.issued if self.found else 0,
            absent=AbsentTeachers(self.bus.state, self.plan.teachers),
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
            packer_of(training.learner, self.settings),
        )
        self.opened.callback(publisher.close)
        return publisher

    def _recording(self, digest: str) -> Recording:
        dead = set(dead_numbers(self.bus, self.directory.path))
        recording = Recording(self.settings, self.found, digest, self.bus.images.read, dead)
        self.opened.callback(recording.close)
        return recording

    def _evaluations(self) -> Evaluations | None:
        if not self.settings.eval.interval:
            return None
        evaluations = Evaluations(self.settings, redis_url(self.settings), self.directory.path)
        self.opened.callback(evaluations.close)
        return evaluations
