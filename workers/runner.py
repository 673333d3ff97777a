"""One worker process from its settings to its exit code: Redis, the run's plan, the stage, the loop."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from pipeline import telemetry
from pipeline.errors import Exit, UserError
from pipeline.stage import Stage, Stats
from pipeline.streams import Bus
from settings.deployment import StageName
from settings.plan import Plan, make_plan, refuse_differences
from settings.root import Settings
from workers.access import connect, redis_url

STAGE_CLASSES: dict[StageName, str] = {
    "generate": "workers.generator.stage:Generator",
    "verify": "workers.verifier.stage:Verifier",
    "score": "workers.teacher.stage:Teacher",
    "train": "workers.trainer.stage:Trainer",
}
REMINDER_S = 10.0
log = telemetry.get_logger()


def run_stage(stage: StageName, settings: Settings) -> Exit:
    """Run one worker of `stage` until the run is finished or the worker is told to stop.

    Raises:
        UserError: Redis cannot be used, the run's plan forbids this worker, or the stage cannot work with these settings.
    """
    worker = f"{stage}-{socket.gethostname()}-{os.getpid()}"
    telemetry.configure(stage, worker, settings.run.name, settings.log)
    _limit_threads(settings)
    with contextlib.closing(connect(settings, redis_url(settings), consumer=worker)) as bus:
        if stage != "train" and not _admitted(stage, settings, bus):
            return Exit.OK
        from pipeline.loop import run_worker

        return run_worker(stage_class(stage)(settings, bus), bus, settings.delivery, block_s=settings.redis.block)


def stage_class(stage: StageName) -> Callable[[Settings, Bus], Stage]:
    """The class of `stage`, imported only now: the trainer's and the teacher's bring torch with them."""
    module, _, name = STAGE_CLASSES[stage].partition(":")
    made: Callable[[Settings, Bus], Stage] = getattr(importlib.import_module(module), name)
    return made


def _admitted(stage: StageName, settings: Settings, bus: Bus) -> bool:
    """Whether the run's plan, once there is one, has a place for this worker; False when it was told to stop meanwhile.

    Raises:
        UserError: it has none.
    """
    plan = wait_for_plan(stage, bus, poll_s=min(1.0, settings.redis.block))
    if plan is None:
        return False
    refuse_differences(make_plan(settings), plan)
    if stage not in plan.streams:
        raise UserError(
            f"a {stage} worker for run {plan.run!r}, whose rollouts pass {' → '.join(plan.streams)}",
            expected="a worker of one of those stages",
            next_step="Start one of those, or a run whose settings ask for this stage.",
            exit=Exit.REFUSED,
        )
    return True


def wait_for_plan(stage: StageName, bus: Bus, *, poll_s: float) -> Plan | None:
    """The run's plan, which its trainer writes. Waits for it, saying so in the log and in heartbeats.

    Returns None when SIGTERM or SIGINT came first.

    Raises:
        UserError: the plan is of another version of Onstream.
    """
    waiting = Stats(detail="waiting for the trainer to write the run's plan")
    with _told_to_stop() as stop:
        since_reminder_s = REMINDER_S
        while (data := bus.read_plan()) is None:
            if since_reminder_s >= REMINDER_S:
                log.info(waiting.detail, next_step="start one with `onstream worker train`, unless it is on its way")
                since_reminder_s = 0.0
            bus.heartbeat(stage, waiting, state="starting")
            if stop.wait(poll_s):
                return None
            since_reminder_s += poll_s
    return Plan.decode(data)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set meanwhile: nothing is in hand yet, so there is nothing to drain."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _limit_threads(settings: Settings) -> None:
    """Tell the tensor library its threads before it is imported; the launcher has done so for the workers it starts."""
    from workers.launcher.environment import default_threads

    threads = settings.deployment.threads or default_threads(make_plan(settings).workers)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if settings.deployment.threads is not None or name not in os.environ:
            os.environ[name] = str(threads)
