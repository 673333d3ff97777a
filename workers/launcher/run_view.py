"""What is shown of a run at one moment, from its snapshot, its metrics and its processes."""

from __future__ import annotations

from onstream.settings.plan import Plan
from onstream.settings.stages import WORK_STAGES, StreamName, stage_of
from onstream.workers.inspection.run_snapshot import RunSnapshot, waits
from onstream.workers.launcher.processes import RunProcesses
from onstream.workers.launcher.progress import RunView, StageView
from onstream.workers.launcher.run_watcher import MetricsTail


def run_view(
    plan: Plan,
    max_steps: int,
    step: int,
    metrics: MetricsTail,
    snapshot: RunSnapshot,
    processes: RunProcesses,
    worker_command: str,
) -> RunView:
    """The view of the run now; `worker_command` starts a worker of a `{kind}`."""
    return RunView(
        step=step,
        max_steps=max_steps,
        metrics=metrics.rows[-1] if metrics.rows else {},
        rollouts_per_s=metrics.rollouts_per_s,
        eta_s=_eta_s(metrics, max_steps - step),
        stages=[_stage_view(stage, plan, snapshot, processes) for stage in plan.streams],
        waits=_waits(plan, snapshot, processes, worker_command),
    )


def _eta_s(metrics: MetricsTail, steps_left: int) -> float | None:
    seconds = metrics.step_seconds
    return None if seconds is None or steps_left <= 0 else seconds * steps_left


def _stage_view(
    stage: StreamName, plan: Plan, snapshot: RunSnapshot, processes: RunProcesses
) -> StageView:
    details = snapshot.workers.get(stage, ())
    return StageView(
        name=stage,
        processes=processes.alive(plan.consumers(stage)),
        heartbeats=len(details),
        ready=stage in snapshot.ready,
        backlog=_backlog(snapshot, stage),
        detail=next(filter(None, details), ""),
    )


def _backlog(snapshot: RunSnapshot, stage: StreamName) -> int:
    """Records that wait for a worker of `stage`."""
    backlog = snapshot.backlog.get(stage, 0)
    if stage_of(stage) in WORK_STAGES:
        return backlog
    # The trainer holds what it has trained until a checkpoint is durable: that waits for nobody.
    return max(0, backlog - snapshot.in_hand.get(stage, 0))


def _waits(
    plan: Plan, snapshot: RunSnapshot, processes: RunProcesses, worker_command: str
) -> list[str]:
    """What the run waits for. Servers come first: their workers wait for them in turn."""
    if snapshot.finished or not snapshot.taken:
        evaluations = processes.running_evaluations
        return [f"{child.name}: the held-out prompts are being answered" for child in evaluations]
    kinds = {stage: plan.consumers(stage) for stage in plan.streams}
    started = {stage: processes.unfinished(kinds[stage]) for stage in kinds}
    stages = waits(snapshot, plan.streams, started, kinds, worker_command)
    return [*processes.servers.waits(), *stages]
