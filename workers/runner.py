"""One worker process, from its settings to its exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Callable

from onstream.pipeline import telemetry
from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.processes import StopSignals, keep_freed_memory
from onstream.pipeline.redis.bus import Bus, connect, redis_url
from onstream.pipeline.stage import Stage, Stats
from onstream.settings.devices import device_of
from onstream.settings.engines import starts_vllm
from onstream.settings.extras import installed, missing_package
from onstream.settings.gpus import memory_share
from onstream.settings.named_teachers import with_teacher
from onstream.settings.plan import Plan, make_plan, refuse_differences
from onstream.settings.record_sizes import longest_entry
from onstream.settings.root import Settings
from onstream.settings.stages import (
    COMPUTING,
    DEFAULT_TEACHER,
    KINDS_OF,
    STAGE_OF,
    WORKERS,
    StreamName,
    WorkerKind,
    score_stream,
)

REMINDER_S = 10.0
log = telemetry.get_logger()


def run_kind(
    kind: WorkerKind,
    settings: Settings,
    slot: str | None = None,
    *,
    optional: bool = False,
    teacher: str = DEFAULT_TEACHER,
) -> Exit:
    """Run one worker of `kind` until the run is finished or the worker is told to stop; an
    `optional` one leaves where it has no place. One that scores does so for the `teacher` of that
    name.

    Its name among the run's consumers holds its process id, or its `slot`: then what it held when
    it died waits for no lease, because its successor has the same name. No two living workers of a
    machine may take one slot.

    Raises:
        UserError: Redis cannot be used, the run's plan forbids this worker, or the worker cannot
            work with these settings.
    """
    own = with_teacher(settings, teacher)
    place = slot or str(os.getpid())
    if teacher != DEFAULT_TEACHER:
        place = f"{teacher}-{place}"
    stream = score_stream(teacher) if kind in KINDS_OF["score"] else STAGE_OF.get(kind, "")
    worker = f"{kind}-{socket.gethostname()}-{place}"
    telemetry.configure(STAGE_OF.get(kind, kind), worker, settings.run.name, settings.log)
    _refuse_without_torch(kind)
    _limit_threads(settings)
    if kind in COMPUTING:
        keep_freed_memory()
    with contextlib.closing(connect(settings, redis_url(settings), consumer=worker)) as bus:
        if kind == "jobs":
            from onstream.workers.jobs.worker import run_jobs

            return run_jobs(settings, bus, redis_url(settings))
        if kind != "trainer" and not _admitted(kind, stream, settings, bus, optional=optional):
            return Exit.OK
        from onstream.pipeline.loop import run_worker

        _limit_gpu_memory(kind, own)
        make = stage_class(class_path(kind, own))
        return run_worker(
            make(own, bus) if teacher == DEFAULT_TEACHER else make(own, bus, name=stream),
            bus,
            settings.delivery,
            block_s=settings.redis.block,
            max_steps=settings.trainer.max_steps,
            longest_bytes=longest_entry(settings, STAGE_OF[kind]),
        )


def _refuse_without_torch(kind: WorkerKind) -> None:
    """Refuse in words, and not by an import's traceback, what this installation cannot run.

    Raises:
        UserError: `kind` computes with models, and torch is not installed.
    """
    if kind in COMPUTING and not installed("torch"):
        raise missing_package("torch", f"a {kind} worker")


def class_path(kind: WorkerKind, settings: Settings) -> str:
    """`module:class` of the stage that does the work of `kind`."""
    spec = WORKERS[kind]
    if spec.chat_class_path and settings.orchestrator.teacher_rollout_model is not None:
        return spec.chat_class_path
    return spec.class_path


def stage_class(path: str) -> Callable[..., Stage]:
    """What makes the stage at `path` (`module:name`) from settings and a bus, and a teacher's from
    the `name` of its stream too. Imported only now: some bring torch.
    """
    module, _, name = path.partition(":")
    made: Callable[..., Stage] = getattr(importlib.import_module(module), name)
    return made


def _admitted(
    kind: WorkerKind, stream: StreamName, settings: Settings, bus: Bus, *, optional: bool
) -> bool:
    """Whether the run's plan, once there is one, has a place for this worker.

    False, too, when it was told to stop meanwhile.

    Raises:
        UserError: it has none, and the worker is not `optional`.
    """
    plan = wait_for_plan(stream, bus, poll_s=min(1.0, settings.redis.block))
    ours = make_plan(settings)
    if plan is None:
        bus.streams.retire(stream)
        return False
    refuse_differences(ours, plan)
    try:
        _refuse_superfluous(kind, stream, ours, plan)
    except UserError as refusal:
        if not optional:
            raise
        log.info("this run needs no such worker", kind=kind, reason=refusal.got)
        bus.streams.retire(stream)
        return False
    bus.limits.note(path=plan.streams)
    return True


def _refuse_superfluous(kind: WorkerKind, stream: StreamName, ours: Plan, plan: Plan) -> None:
    """Refuse a worker that no rollout passes, or whose settings give it nothing to work with.

    Raises:
        UserError: it is one.
    """
    if stream not in plan.streams and STAGE_OF[kind] == "score" and plan.teachers:
        raise UserError(
            f"a {kind} worker for run {plan.run!r} without the name of a teacher",
            expected=f"--name with one of {', '.join(plan.teachers)}",
            next_step=f"For example: onstream worker {plan.consumers(plan.streams[-2])[0]}.",
            exit=Exit.REFUSED,
        )
    if stream not in plan.streams:
        raise UserError(
            f"a {kind} worker for run {plan.run!r}, whose rollouts pass {' → '.join(plan.streams)}",
            expected="a worker of one of those stages",
            next_step="Start one of those, or a run whose settings ask for this worker.",
            exit=Exit.REFUSED,
        )
    serve = [served.partition(" ")[0] for served in ours.consumers(stream)]
    if kind not in serve:
        raise UserError(
            f"a {kind} worker with settings for {', '.join(ours.workers)}",
            expected="settings that say where its scores come from",
            next_step="Set orchestrator.teacher_model for a teacher-external, or "
            "teacher_inference.model.name for a teacher.",
        )


def wait_for_plan(stream: StreamName, bus: Bus, *, poll_s: float) -> Plan | None:
    """The run's plan, which its trainer writes. Waits for it, and says so in heartbeats.

    Returns None when SIGTERM or SIGINT came first.

    Raises:
        UserError: the plan is of another version of Onstream.
    """
    waiting = Stats(detail="waiting for the trainer to write the run's plan")
    with StopSignals() as stop:
        since_reminder_s = REMINDER_S
        while (data := bus.state.plan()) is None:
            if since_reminder_s >= REMINDER_S:
                log.info(
                    waiting.detail,
                    next_step="start one with `onstream worker trainer`, unless it is on its way",
                )
                since_reminder_s = 0.0
            bus.state.write_heartbeat(stream, waiting, state="starting")
            if stop.wait(poll_s):
                return None
            since_reminder_s += poll_s
    return Plan.decode(data)


def _limit_gpu_memory(kind: WorkerKind, settings: Settings) -> None:
    """Keep a worker that shares its GPU within its share of the memory.

    vLLM, whose processes are others, is told its share.
    """
    share = memory_share(settings, kind)
    on_gpu = device_of(settings.deployment) == "cuda"
    if share is not None and on_gpu and not starts_vllm(kind, settings):
        from onstream.pipeline.models.loading import limit_gpu_memory

        limit_gpu_memory(share)


def _limit_threads(settings: Settings) -> None:
    """Tell the tensor library its threads before it is imported.

    The launcher has done so for the workers that it starts.
    """
    from onstream.workers.launcher.environment import default_threads

    threads = settings.deployment.threads or default_threads(make_plan(settings).workers)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if settings.deployment.threads is not None or name not in os.environ:
            os.environ[name] = str(threads)
