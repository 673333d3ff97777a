"""How a trainer starts: it takes the run's lease, resumes the run, and puts its parts together."""

from __future__ import annotations

import contextlib

from onstream.pipeline.redis.access import redis_url
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.ownership import Ownership
from onstream.pipeline.stage import Stats
from onstream.pipeline.telemetry import get_logger
from onstream.settings.plan import Plan, make_plan
from onstream.settings.root import Settings
from onstream.workers.trainer.durability import checkpoint
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
from onstream.workers.trainer.ticket_issuer import TicketIssuer
from onstream.workers.trainer.ticket_planner import TicketPlanner
from onstream.workers.trainer.trainer import Trainer
from onstream.workers.trainer.training import Training, learner_at

log = get_logger()


def start_trainer(settings: Settings, bus: Bus, stats: Stats) -> Trainer:
    """Become the run's trainer, and take it up where its newest whole checkpoint left it.

    `stats` is what the trainer tells of itself in its heartbeat.

    Raises:
        UserError: another trainer has the run, the settings are not the run's, the student cannot
            be loaded, or the disk is full.
    """
    plan = make_plan(settings)
    files = Ownership(settings.run_dir)
    lease = become_trainer(bus, settings.delivery.lease, files)
    directory = RunDirectory(bus, lease, files, settings.run_dir)
    with bus.lease.writing(lease):
        found = checkpoint.load_newest(settings.run_dir / checkpoint.FOLDER)
        agree_on_plan(bus, lease, plan, settings, found.state if found else None)
    with contextlib.ExitStack() as opened:
        trainer = _build(settings, bus, stats, plan, lease, directory, found, opened)
        trainer.begin()
        opened.pop_all()  # from here on the trainer closes them
    return trainer


def _build(
    settings: Settings,
    bus: Bus,
    stats: Stats,
    plan: Plan,
    lease: Lease,
    directory: RunDirectory,
    found: Checkpoint | None,
    opened: contextlib.ExitStack,
) -> Trainer:
    """The trainer at the checkpoint `found`. `opened` closes its parts if a later one fails."""
    state = found.state if found else None
    training = _training(settings, bus, found)
    opened.callback(training.close)
    with directory.changing():
        checkpointing = Checkpointing(bus, lease, directory.path, settings.checkpoint, state)
        planner = _ticket_planner(settings, plan, checkpointing.requeued)
        requests = OperatorRequestHandler(
            bus, lease, directory.path, checkpointing.acknowledgements, planner
        )
        metrics = MetricsFiles(settings, training.step)
        opened.callback(metrics.close)
        publisher = Publisher(
            bus,
            lease,
            settings,
            student_files(directory.path, training.learner),
            nccl_transfer(bus, lease, settings),
            prober(training.learner, settings.inference),
        )
        opened.callback(publisher.close)
        # The weights of the checkpoint were announced before, as a rule: then this announces
        # nothing. It does where Redis lost its data, or the run is new.
        policy = publisher.publish(training.step, training.learner.published_state())
        recording = Recording(settings, found, policy.digest, bus.images.read)
        opened.callback(recording.close)
    evaluations = None
    if settings.eval.interval:
        evaluations = Evaluations(settings, redis_url(settings), directory.path)
        opened.callback(evaluations.close)
    return Trainer(
        settings=settings,
        plan=plan,
        bus=bus,
        lease=lease,
        directory=directory,
        training=training,
        tickets=TicketIssuer(
            bus,
            lease,
            planner,
            requests,
            checkpointing.acknowledgements,
            streams=plan.streams,
            max_backlog=settings.orchestrator.max_backlog,
            issued=state.issued if state else 0,
        ),
        checkpointing=checkpointing,
        requests=requests,
        publisher=publisher,
        policy=policy,
        recording=recording,
        metrics=metrics,
        evaluations=evaluations,
        stats=stats,
    )


def _training(settings: Settings, bus: Bus, found: Checkpoint | None) -> Training:
    training = Training(
        settings,
        learner_at(settings, found),
        worker=bus.consumer,
        step=found.state.step if found else 0,
        dropped=found.state.dropped if found else None,
        images=bus.images.read,
    )
    if found:
        log.info(
            "resuming", checkpoint=str(found.path), step=training.step, issued=found.state.issued
        )
    return training


def _ticket_planner(settings: Settings, plan: Plan, requeued: dict[int, int]) -> TicketPlanner:
    orchestrator = settings.orchestrator
    return TicketPlanner(
        seed=settings.run.seed,
        group_size=orchestrator.group_size,
        batch_size=orchestrator.batch_size,
        max_off_policy_steps=orchestrator.max_off_policy_steps,
        max_steps=settings.trainer.max_steps,
        route=plan.route,
        requeued=requeued,
    )
