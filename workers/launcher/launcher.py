"""`onstream up`: one command that checks the settings, starts Redis and the workers, shows the run,
and reports what it came to.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from onstream.pipeline import telemetry
from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.processes import StopSignals
from onstream.pipeline.redis.bus import Bus
from onstream.settings.devices import gpus_found
from onstream.settings.gpus import Place, gpus_of, placement
from onstream.settings.plan import Plan, make_plan
from onstream.settings.redis import address
from onstream.settings.root import Settings
from onstream.settings.stages import START_ORDER, WORK_STAGES, StageName, WorkerKind
from onstream.settings.toml import toml_text
from onstream.workers.inspection.audit import audit
from onstream.workers.inspection.run_snapshot import RunSnapshot, waits
from onstream.workers.launcher import preflight, report
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.environment import environment
from onstream.workers.launcher.model_servers import KINDS as SERVER_KINDS
from onstream.workers.launcher.model_servers import Servers, serve
from onstream.workers.launcher.progress import Display, StageView, View, result_table
from onstream.workers.launcher.run_watcher import MetricsTail, Watcher
from onstream.workers.launcher.shutdown import wait_until_alone
from onstream.workers.launcher.single_launcher import only_launcher
from onstream.workers.launcher.supervisor import (
    Child,
    GaveUp,
    Supervisor,
    always,
    process_cpu_seconds,
)
from onstream.workers.launcher.vllm_server_process import ModelServer

TICK_S = 0.05
WATCH_S = 0.25
DRAIN_MARGIN_S = 10.0
SERVER_STOP_S = 20.0
EVAL = "eval"
COMMAND = "onstream"
log = telemetry.get_logger()


def up(
    settings: Settings,
    files: Sequence[Path],
    overrides: Sequence[str],
    console: Console | None = None,
) -> Exit:
    """Run what the settings' plan starts here, from the checks to the report; returns how it ended.

    Raises:
        UserError: something is wrong that shows before the first worker starts. What a run had done
            already is as it was.
    """
    plan = make_plan(settings)
    trains = bool(make_plan(settings).workers.get("trainer"))
    _refuse_lonely_workers(settings, trains)
    preflight.check_gpus(settings, plan, gpus_found())
    preflight.check_files(settings, plan.teacher)
    stop = StopSignals()  # the first one drains, the second one hurries
    with contextlib.ExitStack() as stack:
        if trains:
            stack.enter_context(only_launcher(settings.run_dir))
        server = _embedded_redis(settings)
        if server is not None:
            stack.callback(server.stop)
            server.start()
        bus = _connect(settings, server)
        stack.callback(bus.close)
        preflight.check_resume(
            settings,
            plan,
            _existing_plan(settings, bus),
            lambda: len(audit(settings.run_dir, bus)["in_flight"]),
        )
        if trains:
            (settings.run_dir / "settings.toml").write_text(toml_text(settings), encoding="utf-8")
        stack.enter_context(_own_log(settings))
        stack.enter_context(stop)
        display = stack.enter_context(
            Display(
                settings.run.name,
                console or Console(highlight=False),
                settings.deployment.status_interval,
            )
        )
        # Whether the run may exist has been decided here; a trainer that is restarted would find
        # its own.
        every_override = [*overrides, "run.resume=auto"]
        arguments = [*map(str, files), *_as_options(every_override)]
        return Launch(settings, plan, arguments, server, bus, display, stop).run()


class Launch:
    """One run from its first worker to its report.

    Consumes heartbeats, backlogs and `metrics.jsonl`; waits for its children; is unblocked by their
    ends and by signals; produces processes, evaluations and the report.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        arguments: Sequence[str],
        server: EmbeddedRedis | None,
        bus: Bus,
        display: Display,
        stop: StopSignals,
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._server = server
        self._display = display
        self._stop = stop
        self._run_dir = settings.run_dir
        self._arguments = arguments
        environ = environment(settings.deployment, plan.workers, server.url if server else None)
        self._supervisor = Supervisor(environ, settings.deployment.max_restarts, self._say)
        self._gpus = placement(settings, plan, gpus_found()) or {}
        self._metrics = MetricsTail(self._run_dir / "metrics.jsonl")
        self._bus = bus
        self._watcher = Watcher(bus.state, WATCH_S)
        self._launched = time.time()
        self._startup_cpu_s: dict[str, float] = {}  # until the first step of this launch
        self._trainer: Child | None = None
        self._servers = Servers(settings, plan, self._log_file)
        self._final_eval_due = False

    def run(self) -> Exit:
        """Start everything and see it through."""
        self._watcher.start()
        try:
            self._start()
            while not all(
                child.done for child in self._supervisor.children if child.kind not in SERVER_KINDS
            ):
                if self._stop.requests:
                    return self._stopped_by_request()
                self._tick()
            return self._finished()
        except GaveUp as gave_up:
            return self._stopped_by(gave_up)
        finally:
            self._watcher.stop()
            self._supervisor.kill()
            self._servers.stop()

    def _say(self, sentence: str) -> None:
        self._display.say(sentence)
        log.info(sentence)

    @property
    def _step(self) -> int:
        """Steps taken: by the metrics of the trainer here, or by the policy version of one
        elsewhere.
        """
        return self._metrics.step if self._trainer is not None else self._watcher.latest.version

    def _start(self) -> None:
        for server in self._servers.all:
            self._start_server(server)
        for kind in START_ORDER:
            for index in range(self._plan.workers.get(kind, 0)):
                child = self._start_worker(kind, index)
                self._trainer = child if kind == "trainer" else self._trainer
        self._say(
            f"run {self._settings.run.name}: {len(self._supervisor.children)} workers, logs in {self._run_dir / 'logs'}"
        )
        if self._trainer is not None:
            self._final_eval_due = self._settings.eval.samples > 0
            self._evaluate(0)

    def _start_server(self, server: ModelServer) -> None:
        """Start a server. What keeps it from serving at all, a restart will not mend."""
        arguments = [server.kind, *self._arguments, "--port", str(server.port)]
        gpus = self._gpus_of(self._servers.place(server))
        self._start_child(
            server.name, server.kind, arguments, environ=gpus, mendable=lambda: server.has_served
        )
        server.start()
        self._say(
            f"{server.name}: vLLM loads {self._servers.model(server)} (its log: {self._log_file(server.name)})"
        )

    def _start_worker(self, kind: WorkerKind, index: int) -> Child:
        """Start the index-th worker of `kind`; one that asks servers waits for them, or for the end
        of the run.
        """
        asked = self._servers.asked_by(kind, index)
        overrides = _as_options(self._servers.overrides(kind, asked))
        arguments = ["worker", kind, *self._arguments, *overrides, "--slot", f"slot{index}"]
        if not asked:
            return self._start_child(
                f"{kind}-{index}", kind, arguments, environ=self._gpus_of((kind, index))
            )
        return self._start_child(
            f"{kind}-{index}",
            kind,
            arguments,
            may_start=lambda: self._watcher.latest.finished or serve(asked),
        )

    def _gpus_of(self, place: Place) -> dict[str, str]:
        """The variable that keeps a model to its GPUs; none where workers compute on the CPU, or
        are more than GPUs.
        """
        gpus = gpus_of(self._settings, self._plan, self._gpus, place)
        return {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}

    def _start_child(
        self,
        name: str,
        kind: str,
        arguments: Sequence[str],
        *,
        once: bool = False,
        environ: Mapping[str, str] | None = None,
        may_start: Callable[[], bool] = always,
        mendable: Callable[[], bool] = always,
    ) -> Child:
        return self._supervisor.start(
            name,
            kind,
            COMMAND,
            arguments,
            self._log_file(name),
            once=once,
            environ=environ,
            may_start=may_start,
            mendable=mendable,
        )

    def _log_file(self, name: str) -> Path:
        return self._run_dir / "logs" / f"{name}.log"

    def _evaluate(self, version: int) -> None:
        """Evaluate a policy version in a process of its own, unless a former launch did."""
        elsewhere = self._settings.deployment.count_elsewhere("jobs")
        jobs_workers = self._plan.workers.get("jobs") or elsewhere
        if (
            version
            and jobs_workers
            and self._settings.eval.interval
            and version % self._settings.eval.interval == 0
        ):
            return  # the trainer has asked a jobs worker for it
        done = {row["version"] for row in report.read_rows(self._run_dir / "evals.jsonl")}
        if self._settings.eval.samples and version not in done:
            self._start_child(
                f"{EVAL}-{version}",
                EVAL,
                [EVAL, str(self._run_dir), "--version", str(version)],
                once=True,
            )

    def _tick(self) -> None:
        self._keep_redis()
        self._metrics.read()
        for news in self._servers.news():
            self._say(news)
        self._supervisor.poll(progress=self._step, finished=self._watcher.finished)
        if self._final_eval_due and self._trainer is not None and self._trainer.done:
            self._final_eval_due = False
            self._metrics.read()
            self._evaluate(self._metrics.step)
        if not self._startup_cpu_s and self._metrics.stepped_since(self._launched):
            self._startup_cpu_s = {
                kind: seconds
                for kind, seconds in self._supervisor.cpu_seconds().items()
                if kind != EVAL
            }
        self._display.show(self._view())
        time.sleep(TICK_S)

    def _keep_redis(self) -> None:
        if self._server is not None and not self._server.alive:
            self._say(
                f"the embedded Redis died; starting it again on the same data ({self._server.data})"
            )
            self._server.start()

    def _view(self) -> View:
        snapshot = self._watcher.latest
        kinds = {stage: self._plan.kinds(stage) for stage in self._plan.streams}
        left_over = [child.kind for child in self._supervisor.children if not child.done]
        started = {stage: sum(kind in kinds[stage] for kind in left_over) for stage in kinds}
        stages = [
            StageView(
                name=stage,
                processes=len(self._supervisor.running(*kinds[stage])),
                heartbeats=len(snapshot.workers.get(stage, ())),
                ready=stage in snapshot.ready,
                backlog=_waiting(snapshot, stage),
                detail=next((detail for detail in snapshot.workers.get(stage, ()) if detail), ""),
            )
            for stage in self._plan.streams
        ]
        seconds = self._metrics.step_seconds
        left = self._settings.trainer.max_steps - self._step
        return View(
            step=self._step,
            max_steps=self._settings.trainer.max_steps,
            metrics=self._metrics.rows[-1] if self._metrics.rows else {},
            rollouts_per_s=self._metrics.rollouts_per_s,
            eta_s=seconds * left if seconds is not None and left > 0 else None,
            stages=stages,
            waits=self._waits(started, kinds),
        )

    def _waits(
        self, started: Mapping[StageName, int], kinds: Mapping[StageName, Sequence[str]]
    ) -> list[str]:
        """What the run waits for, by the newest snapshot of its streams; the servers first, which
        their workers wait for in turn.
        """
        snapshot = self._watcher.latest
        if snapshot.finished or not snapshot.taken:
            return self._evaluations()
        return [*self._servers.waits(), *waits(snapshot, self._plan.streams, started, kinds)]

    def _evaluations(self) -> list[str]:
        """What is left to wait for when training has ended."""
        return [
            f"{child.name}: the held-out prompts are being answered"
            for child in self._supervisor.running(EVAL, "jobs")
        ]

    def _finished(self) -> Exit:
        self._drain_children(self._supervisor.running(*SERVER_KINDS), SERVER_STOP_S)
        if self._trainer is not None:
            ends_redis = self._settings.redis.shut_down and self._server is None
            if ends_redis:
                wait_until_alone(self._bus.state, self._say, lambda: self._stop.requests > 0)
            self._report()
            if ends_redis and not self._stop.requests:
                self._bus.connection.shut_down()
        return Exit.OK

    def _stopped_by_request(self) -> Exit:
        self._say(
            "stopping: the workers finish what they have in hand, then the trainer writes a checkpoint (again to kill them)"
        )
        self._drain()
        self._metrics.read()
        self._say(
            f"stopped at step {self._step}; `onstream up` with the same settings goes on from there"
        )
        return Exit.OK

    def _stopped_by(self, gave_up: GaveUp) -> Exit:
        self._say(f"the run stops: {gave_up.reason}")
        for line in gave_up.log:
            self._say(f"  {line}")
        self._drain()
        if (
            self._trainer is not None and self._trainer.done
        ):  # it was only the evaluation that failed
            self._report()
        return gave_up.exit

    def _drain(self) -> None:
        """The workers first and the servers that they ask, then the trainer, whose checkpoint takes
        what they finished.

        It is never killed for being slow.
        """
        workers = [
            child
            for child in self._supervisor.running()
            if child is not self._trainer and child.kind not in SERVER_KINDS
        ]
        within_s = self._settings.delivery.drain + DRAIN_MARGIN_S
        self._drain_children(workers, within_s)
        self._drain_children(self._supervisor.running(*SERVER_KINDS), SERVER_STOP_S)
        self._drain_children([self._trainer] if self._trainer else [], None)

    def _drain_children(self, children: Sequence[Child], within_s: float | None) -> None:
        def tick() -> None:
            self._keep_redis()
            time.sleep(TICK_S)

        self._supervisor.drain(
            children, within_s=within_s, hurry=lambda: self._stop.requests > 1, tick=tick
        )

    def _report(self) -> None:
        written = report.build(self._run_dir, self._usage() if self._startup_cpu_s else None)
        self._display.result(result_table(written))
        for name in ("curves.png", "report.json"):
            self._say(f"{self._run_dir / name}")

    def _usage(self) -> dict[str, dict[str, float]]:
        """CPU seconds of each kind of process, those until the first step apart."""
        used = self._supervisor.cpu_seconds()
        used = {
            kind: seconds - self._startup_cpu_s.get(kind, 0.0) for kind, seconds in used.items()
        }
        if self._server is not None and self._server.pid is not None:
            used["redis"] = process_cpu_seconds(self._server.pid)
        own = resource.getrusage(resource.RUSAGE_SELF)
        used["launcher"] = own.ru_utime + own.ru_stime
        rounded = {kind: round(seconds, 2) for kind, seconds in used.items()}
        return {
            "cpu_seconds": rounded,
            "cpu_seconds_startup": {
                kind: round(seconds, 2) for kind, seconds in self._startup_cpu_s.items()
            },
        }


def _waiting(snapshot: RunSnapshot, stage: StageName) -> int:
    """Records that wait for a worker of `stage`."""
    waiting = snapshot.backlog.get(stage, 0)
    if stage in WORK_STAGES:
        return waiting
    # The trainer holds what it has trained until a checkpoint is durable: that waits for nobody.
    return max(0, waiting - snapshot.in_hand.get(stage, 0))


def _as_options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@contextlib.contextmanager
def _own_log(settings: Settings) -> Iterator[None]:
    """Keep the launcher's own log lines (a Redis that is away, say) out of what it shows."""
    logs = settings.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "launcher.log").open("a", encoding="utf-8") as stream:
        telemetry.configure(
            "launcher", f"launcher-{os.getpid()}", settings.run.name, settings.log, stream=stream
        )
        yield


def _refuse_lonely_workers(settings: Settings, trains: bool) -> None:
    if not trains and settings.redis.url is None:
        raise UserError(
            f"deployment.stages = {list(settings.deployment.stages or ())} without `train`, and no redis.url",
            expected="the address of the Redis of the run that these workers join",
            next_step="Set redis.url (ONSTREAM_REDIS__URL), or add `train` to deployment.stages.",
        )


def _embedded_redis(settings: Settings) -> EmbeddedRedis | None:
    if settings.redis.url is not None:
        return None
    return EmbeddedRedis(
        settings.run_dir / "redis",
        max_memory_mb=settings.redis.max_memory,
        server_bin=settings.redis.server_bin,
    )


def _connect(settings: Settings, server: EmbeddedRedis | None) -> Bus:
    redis = settings.redis
    url = server.url if server is not None else address(redis) or ""
    consumer = f"launcher-{os.getpid()}"
    return Bus.connect(
        url,
        settings.run.name,
        consumer=consumer,
        block_s=redis.block,
        connect_timeout_s=redis.connect_timeout,
    )


def _existing_plan(settings: Settings, bus: Bus) -> Plan | None:
    """The plan that the run was started with: from Redis, or from the run directory if another
    Redis held it.
    """
    written = settings.run_dir / "plan.json"
    data = bus.state.plan() or (written.read_bytes() if written.exists() else None)
    return None if data is None else Plan.decode(data)
