"""`deployment.balance = "auto"`: one more worker for a stage that the trainer waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onstream.pipeline import telemetry
from onstream.pipeline.processes import usable_cores
from onstream.settings.devices import available_host_bytes
from onstream.settings.plan import Plan
from onstream.settings.root import Settings
from onstream.settings.scalable_stages import computes_here, scalable_stages
from onstream.settings.stages import StageName, WorkerKind
from onstream.workers.launcher.cpu_usage import CpuUsage
from onstream.workers.launcher.processes import RunProcesses
from onstream.workers.launcher.run_watcher import RECENT_STEPS, MetricsTail, RunWatcher
from onstream.workers.launcher.scaling_decision import (
    Window,
    has_threads,
    one_more_worker,
    stage_to_grow,
    was_worth_it,
)
from onstream.workers.launcher.supervisor import Child

WINDOW_STEPS = RECENT_STEPS
FREE_TIMES = 2
"""A worker is added where the free memory is so many times what one like it takes."""
log = telemetry.get_logger()


@dataclass(frozen=True)
class AddedWorker:
    """A worker that was added, and what it has to show: `workers` counts the stage's with it."""

    stage: StageName
    child: Child
    workers: int
    predicted: float
    before: float


@dataclass(frozen=True)
class WindowStart:
    """When a window of steps began, and the CPU seconds of the run until then."""

    step: int
    cpu_s: float
    time_s: float


class Balance:
    """Starts one worker at a time, and takes it away again where it gave little.

    It looks at windows of steps. One counts only while the workers stay the same: it begins when
    the worker that was added takes work, or when the one that was taken away has left. A stage
    whose last worker gave little is left alone for the rest of the launch. Does nothing without
    `balance = "auto"`.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        processes: RunProcesses,
        cpu: CpuUsage,
        metrics: MetricsTail,
        watcher: RunWatcher,
    ) -> None:
        self._plan = plan
        self._stages = scalable_stages(settings, plan)
        self._last_step = settings.trainer.max_steps - 2 * WINDOW_STEPS
        self._processes = processes
        self._cpu = cpu
        self._metrics = metrics
        self._watcher = watcher
        self._cores = usable_cores()
        self._launched = time.time()
        self._start: WindowStart | None = None
        self._trial: AddedWorker | None = None
        self._leaving: Child | None = None
        self._done: list[dict[str, Any]] = []

    def look(self) -> Iterator[str]:
        """Do what the last steps ask for, if there are enough. Yields what there is to say."""
        if not self._stages or self._processes.trainer is None:
            return
        if self._watcher.latest.finished:
            self._end()
            return
        try:
            window = self._window()
            if window is not None:
                yield from self._judge(window)
                yield from self._add(window)
        except Exception as error:
            log.exception("the balance of the workers has failed")
            self._stages = {}
            yield f"the workers stay as many as they are: deployment.balance failed ({error!r})"

    def report(self) -> list[dict[str, Any]]:
        """What was done, as the report holds it; with the worker that is on trial still."""
        if self._trial is None:
            return self._done
        return [*self._done, _outcome(self._trial, None, kept=True)]

    def _end(self) -> None:
        """Have nobody wait for a worker that loads its model still, though the run has ended."""
        if self._trial is not None and not self._trial.child.dismissed:
            self._processes.take_away(self._trial.child)

    def _window(self) -> Window | None:
        """What the steps since the last change came to, once there are enough of them."""
        if not self._has_settled():
            self._start = None
            return None
        step = self._metrics.step
        # A trainer that was started again goes back to its checkpoint.
        if self._start is None or step < self._start.step:
            self._start = self._now()
        if step < self._start.step + WINDOW_STEPS:
            return None
        start = self._start
        self._start = self._now()
        cores_s = (self._start.time_s - start.time_s) * self._cores
        return Window(
            rollouts_per_s=self._metrics.rollouts_per_s or 0.0,
            waited_for=self._metrics.waited_for,
            cores_busy=(self._start.cpu_s - start.cpu_s) / cores_s,
        )

    def _has_settled(self) -> bool:
        """Whether the run has taken a step, and the workers are those that it shall have."""
        if not self._metrics.stepped_since(self._launched):
            return False
        if self._leaving is not None and not self._leaving.done:
            return False
        trial = self._trial
        if trial is None or trial.child.done:
            return True
        return self._watcher.latest.taking.get(trial.stage, 0) >= trial.workers

    def _now(self) -> WindowStart:
        return WindowStart(self._metrics.step, self._cpu.total_s(), time.monotonic())

    def _judge(self, window: Window) -> Iterator[str]:
        """Say what the worker on trial gave, and take it away where that is little."""
        trial = self._trial
        if trial is None:
            return
        self._trial = None
        after = window.rollouts_per_s
        worth_it = was_worth_it(trial.before, trial.predicted, after) and not trial.child.done
        self._done.append(_outcome(trial, after, kept=worth_it))
        sentence = (
            f"{trial.workers} {trial.child.kind}s: {after:.4g} rollouts/s, "
            f"{trial.predicted:.4g} predicted, {trial.before:.4g} before"
        )
        if not worth_it:
            del self._stages[trial.stage]
            self._leaving = trial.child
            self._processes.take_away(trial.child)
            sentence += f"; {trial.child.name} leaves again"
        yield sentence

    def _add(self, window: Window) -> Iterator[str]:
        """Start one more worker of the stage that is waited for most, if there is one."""
        # What the window says is of the workers with the one that is leaving.
        if not self._has_settled() or self._metrics.step > self._last_step:
            return
        workers = self._workers()
        candidates = [stage for stage, kind in self._stages.items() if self._has_room(kind)]
        stage = stage_to_grow(window, workers, candidates)
        if stage is None:
            return
        before = window.rollouts_per_s
        predicted = one_more_worker(window, workers)[stage]
        child = self._processes.add_worker(self._stages[stage])
        self._trial = AddedWorker(stage, child, workers[stage] + 1, predicted, before)
        self._start = None
        yield (
            f"the trainer waited {window.waited_for[stage]:.0%} of the last {WINDOW_STEPS} steps "
            f"for {stage}: {child.name} is started, {predicted:.4g} rollouts/s are predicted "
            f"(now {before:.4g})"
        )

    def _workers(self) -> dict[StageName, int]:
        """The workers of each stage: those of this launch, or all that are there if more are."""
        taking = self._watcher.latest.taking
        return {
            stage: max(count, taking.get(stage, 0))
            for stage, count in self._processes.workers_by_stage.items()
        }

    def _has_room(self, kind: WorkerKind) -> bool:
        """Whether the cores and the memory of this machine suffice for one more of `kind`."""
        takes = self._processes.bytes_of_one(kind)
        if available_host_bytes() < FREE_TIMES * takes:
            return False
        if not computes_here(kind, self._plan):
            return True
        count = self._processes.count
        computing = sum(count(one) for one in self._plan.workers if computes_here(one, self._plan))
        return has_threads(count(kind), computing, self._processes.threads, self._cores)


def _outcome(trial: AddedWorker, after: float | None, *, kept: bool) -> dict[str, Any]:
    return {
        "stage": trial.stage,
        "workers": trial.workers,
        "predicted": trial.predicted,
        "before": round(trial.before, 2),
        "after": None if after is None else round(after, 2),
        "kept": kept,
    }
