"""`onstream up`: starts Redis and the workers, shows the run until it ends, and reports."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError
from rich.console import Console

from onstream.pipeline import telemetry
from onstream.pipeline.command_line import command
from onstream.pipeline.errors import Exit
from onstream.pipeline.processes import StopSignals
from onstream.pipeline.redis.bus import Bus, connect
from onstream.settings.paths import with_absolute_paths
from onstream.settings.plan import Plan, make_plan
from onstream.settings.record_sizes import max_memory_mib
from onstream.settings.redis import address
from onstream.settings.root import Settings
from onstream.settings.rules.deployment import deployment_warnings
from onstream.settings.scalable_stages import workers_with_room
from onstream.settings.toml import toml_text
from onstream.workers.inspection.dead_letters import dead_by_reason
from onstream.workers.launcher import ending, preflight, report
from onstream.workers.launcher.balance import Balance
from onstream.workers.launcher.cpu_usage import CpuUsage
from onstream.workers.launcher.disk_watch import DiskWatch
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.environment import environment
from onstream.workers.launcher.existing_run import check_resume, existing_plan, renamed
from onstream.workers.launcher.finished_run import finished_step, refuse_changes
from onstream.workers.launcher.processes import RunProcesses
from onstream.workers.launcher.progress import Display, RunView, result_table
from onstream.workers.launcher.redis_keeper import RedisKeeper
from onstream.workers.launcher.run_view import run_view
from onstream.workers.launcher.run_watcher import MetricsTail, RunWatcher
from onstream.workers.launcher.shutdown import wait_until_alone
from onstream.workers.launcher.single_launcher import only_launcher
from onstream.workers.launcher.supervisor import Child, ChildFailed, Supervisor

TICK_S = 0.05
WATCH_S = 0.25
DRAIN_MARGIN_S = 10.0
SERVER_STOP_S = 20.0
REPORT_RETRY_S = 1.0
log = telemetry.get_logger()


def up(
    settings: Settings,
    files: Sequence[Path],
    overrides: Sequence[str],
    console: Console | None = None,
) -> Exit:
    """Run what the settings' plan starts here, from the checks to the report.

    Returns how it ended.

    Raises:
        UserError: something is wrong that shows before the first worker starts. Nothing that the
            run had done before is changed then.
    """
    plan = make_plan(settings)
    trains = plan.workers.get("trainer", 0) > 0
    preflight.refuse_problems(settings, plan)
    stop = StopSignals()  # the first one drains, the second one kills
    with contextlib.ExitStack() as stack:
        if trains:
            stack.enter_context(only_launcher(settings.run_dir))
        redis = _embedded_redis(settings)
        if redis is not None:
            stack.callback(redis.stop)
            redis.start()
        bus = _connect(settings, redis)
        stack.callback(bus.close)
        existing = existing_plan(settings, bus)
        check_resume(settings, plan, existing, bus)
        if trains and existing and (step := finished_step(settings, bus)) is not None:
            refuse_changes(plan, existing, step)
            # A Redis that ends with the run stays until the workers of other containers have seen
            # the end, which takes the whole way.
            if not settings.redis.shut_down:
                return _show_finished(settings, step, console)
        # Only now: a launcher that is refused must leave the run's own settings as they were.
        if trains:
            text = toml_text(with_absolute_paths(settings))
            (settings.run_dir / "settings.toml").write_text(text, encoding="utf-8")
        stack.enter_context(_own_log(settings))
        stack.enter_context(stop)
        display = stack.enter_context(_display(settings, console))
        if renaming := renamed(settings):
            display.say(renaming)
        # Whether the run may exist has been decided here: a trainer that is started again would
        # find its own.
        options = [part for one in [*overrides, "run.resume=auto"] for part in ("--set", one)]
        arguments = [*map(str, files), *options]
        return Launcher(settings, plan, arguments, redis, bus, display, stop).run()


class Launcher:
    """Sees one run through, from its first worker to its report.

    Consumes heartbeats, backlogs and `metrics.jsonl`; waits for its children; is unblocked by their
    ends and by signals; produces processes, evaluations and the report.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        arguments: Sequence[str],
        redis: EmbeddedRedis | None,
        bus: Bus,
        display: Display,
        stop: StopSignals,
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._redis = redis
        self._bus = bus
        self._display = display
        self._stop = stop
        self._run_dir = settings.run_dir
        workers = workers_with_room(settings, plan)
        environ = environment(settings.deployment, workers, redis.url if redis else None)
        self._disk = DiskWatch(self._run_dir)
        max_restarts = settings.deployment.max_restarts
        self._supervisor = Supervisor(
            environ, max_restarts, self._say, excused=lambda: self._disk.full
        )
        self._redis_keeper = RedisKeeper(redis, max_restarts, self._say) if redis else None
        self._watcher = RunWatcher(bus.state, WATCH_S, settings.trainer.max_steps)
        self._metrics = MetricsTail(self._run_dir / "metrics.jsonl")
        self._cpu = CpuUsage(self._supervisor, redis)
        self._processes = RunProcesses(
            settings, plan, arguments, self._supervisor, lambda: self._watcher.latest.finished
        )
        self._balance = Balance(
            settings, plan, self._processes, self._cpu, self._metrics, self._watcher
        )
        self._final_evaluation_due = False
        self._superseded = False

    def run(self) -> Exit:
        """Start everything and see it through."""
        self._watcher.start()
        try:
            self._start()
            while not self._processes.done:
                if self._stop.requests:
                    return self._stopped_by_request()
                try:
                    self._tick()
                except ChildFailed as failure:
                    self._go_on_without_trainer(failure)
            return self._finished()
        except ChildFailed as failure:
            return self._stopped_by(failure)
        finally:
            self._watcher.stop()
            self._supervisor.kill()
            self._processes.servers.stop()

    def _say(self, sentence: str) -> None:
        self._display.say(sentence)
        log.info(sentence)

    @property
    def _trainer(self) -> Child | None:
        return self._processes.trainer

    @property
    def _step(self) -> int:
        """Steps taken: by the trainer's metrics, or by the policy version where it is elsewhere."""
        return self._metrics.step if self._trainer is not None else self._watcher.latest.version

    def _start(self) -> None:
        for sentence in self._processes.start():
            self._say(sentence)
        count = len(self._supervisor.children)
        for warning in deployment_warnings(self._settings):
            self._say(warning)
        self._say(f"run {self._plan.run}: {count} processes, logs in {self._run_dir / 'logs'}")
        if self._trainer is not None:
            self._final_evaluation_due = self._settings.eval.samples > 0
            self._processes.evaluate(0)

    def _tick(self) -> None:
        for sentence in self._disk.news():
            self._say(sentence)
        self._keep_redis()
        self._metrics.read()
        for sentence in self._processes.servers.news():
            self._say(sentence)
        self._supervisor.poll(progress=self._step, finished=self._watcher.finished)
        if self._final_evaluation_due and self._trainer is not None and self._trainer.done:
            self._final_evaluation_due = False
            self._metrics.read()  # the last step may have been written since the read above
            self._processes.evaluate(self._metrics.step)
        self._cpu.look(self._metrics)
        for sentence in self._balance.look():
            self._say(sentence)
        self._display.show(self._view())
        time.sleep(TICK_S)

    def _keep_redis(self) -> None:
        if self._redis_keeper is not None:
            self._redis_keeper.keep(self._step)

    def _go_on_without_trainer(self, failure: ChildFailed) -> None:
        """Go on where another trainer, which depends on the Redis of this launcher, has taken over.

        Raises:
            ChildFailed: it is another failure.
        """
        trainer = self._trainer
        refused = failure.exit is Exit.REFUSED and failure.child is trainer
        other = self._other_trainer() if self._redis is not None and refused else None
        if other is None or trainer is None:
            raise failure
        trainer.done = True
        self._processes.trainer = None
        self._final_evaluation_due = False
        self._superseded = True
        self._say(
            f"{other} has taken the run over. Redis and the other workers stay until the run has "
            "ended; Ctrl-C stops them, and that trainer with them"
        )

    def _other_trainer(self) -> str | None:
        """The name of a living trainer that is not a child of this launcher."""
        for beat in self._bus.state.workers():
            ours = beat.host == socket.gethostname() and beat.worker.endswith("-slot0")
            if beat.stage == "train" and not ours:
                return beat.worker
        return None

    def _view(self) -> RunView:
        return run_view(
            self._plan,
            self._settings.trainer.max_steps,
            self._step,
            self._metrics,
            self._watcher.latest,
            self._processes,
            f"{command()} worker {{kind}} {self._run_dir}",
        )

    def _finished(self) -> Exit:
        self._drain_children(self._processes.running_servers, SERVER_STOP_S)
        while self._superseded and self._other_trainer() and not self._stop.requests:
            time.sleep(WATCH_S)  # it still needs Redis: its last acknowledgements, and its lease
        if self._trainer is None:
            return Exit.OK
        ends_redis = self._settings.redis.shut_down and self._redis is None
        if ends_redis:
            wait_until_alone(self._bus.state, self._say, lambda: self._stop.requests > 0)
        written = self._report()
        for sentence in ending.sentences(written, self._run_dir):
            self._say(sentence)
        if ends_redis and not self._stop.requests:
            self._bus.connection.shut_down()
        return Exit.FAILED if ending.nothing_learnt(written) else Exit.OK

    def _stopped_by_request(self) -> Exit:
        self._say(
            "stopping: the workers finish what they have in hand, then the trainer writes a "
            "checkpoint. Ctrl-C again kills them."
        )
        self._drain()
        self._metrics.read()
        self._say(
            f"stopped at step {self._step}; `onstream up` with the same settings resumes from there"
        )
        return Exit.OK

    def _stopped_by(self, failure: ChildFailed) -> Exit:
        self._say(f"the run stops: {failure.reason}")
        for line in failure.log:
            self._say(f"  {line}")
        self._drain()
        if self._trainer is not None and self._trainer.done:
            self._report()  # only the evaluation has failed
        return failure.exit

    def _drain(self) -> None:
        """Stop the workers, then the servers that they ask, then the trainer.

        In this order because the trainer's checkpoint takes what the workers finished. The trainer
        is never killed for being slow.
        """
        within_s = self._settings.delivery.drain + DRAIN_MARGIN_S
        self._drain_children(self._processes.running_workers, within_s)
        self._drain_children(self._processes.running_servers, SERVER_STOP_S)
        self._drain_children([self._trainer] if self._trainer else [], None)

    def _drain_children(self, children: Sequence[Child], within_s: float | None) -> None:
        def tick() -> None:
            with contextlib.suppress(ChildFailed):  # the run ends as it is
                self._keep_redis()  # without it no worker could give back what it holds
            time.sleep(TICK_S)

        self._supervisor.drain(
            children, within_s=within_s, hurry=lambda: self._stop.requests > 1, tick=tick
        )

    def _report(self) -> dict[str, Any]:
        written = self._written_report()
        self._display.result(result_table(written))
        for name in ("curves.png", "report.json"):
            self._say(f"{self._run_dir / name}")
        return written

    def _written_report(self) -> dict[str, Any]:
        """Write the report, as soon as there is room on the disk.

        Raises:
            OSError: it cannot be written, and the launcher was told to stop.
        """
        dead_letters = self._dead_letters()
        workers = self._processes.workers_by_stage
        usage = self._cpu.report()
        if usage is not None:
            usage["balance"] = self._balance.report()
        told = False
        while True:
            try:
                return report.build(self._run_dir, usage, dead_letters, workers)
            except OSError as error:
                if self._stop.requests:
                    raise
                if not told:
                    self._say(f"the report cannot be written ({error}); trying again until it can")
                told = True
                time.sleep(REPORT_RETRY_S)

    def _dead_letters(self) -> list[dict[str, Any]]:
        """How many dead letters there are of each stage and reason."""
        try:
            groups = dead_by_reason(self._bus, self._run_dir)["reasons"]
        except RedisError as error:
            self._say(f"the dead letters cannot be read ({error})")
            return []
        return [{name: group[name] for name in ("stage", "reason", "count")} for group in groups]


def _embedded_redis(settings: Settings) -> EmbeddedRedis | None:
    if settings.redis.url is not None:
        return None
    return EmbeddedRedis(
        settings.run_dir / "redis",
        max_memory_mb=max_memory_mib(settings),
        server_bin=settings.redis.server_bin,
    )


def _connect(settings: Settings, redis: EmbeddedRedis | None) -> Bus:
    url = address(settings.redis) or "" if redis is None else redis.url
    return connect(settings, url, consumer=f"launcher-{os.getpid()}")


def _show_finished(settings: Settings, step: int, console: Console | None) -> Exit:
    """Say that the run has finished, and what it came to."""
    with _display(settings, console) as display:
        display.say(
            f"run {settings.run.name} is already finished at step {step}. For more steps raise "
            "trainer.max_steps; for a new run choose another run.name."
        )
        written = report.of_files(settings.run_dir)
        display.result(result_table(written))
        for sentence in ending.sentences(written, settings.run_dir):
            display.say(sentence)
    return Exit.FAILED if ending.nothing_learnt(written) else Exit.OK


@contextlib.contextmanager
def _own_log(settings: Settings) -> Iterator[None]:
    """Keep the launcher's own log lines (a Redis that is away, say) out of what it shows."""
    logs = settings.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    name = f"launcher-{os.getpid()}"
    stream = (logs / "launcher.log").open("a", encoding="utf-8")
    try:
        telemetry.configure("launcher", name, settings.run.name, settings.log, stream=stream)
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk may be full
            stream.close()


def _display(settings: Settings, console: Console | None) -> Display:
    console = console or Console(highlight=False)
    return Display(settings.run.name, console, settings.deployment.status_interval)
