"""The processes of one run: which are started, with which arguments, and on which GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onstream.pipeline.run_files.json_lines import read_rows
from onstream.settings.devices import gpus_found
from onstream.settings.gpus import Place, gpus_of, placement
from onstream.settings.plan import Plan, kind_of_named
from onstream.settings.root import Settings
from onstream.settings.stages import START_ORDER, WORK_STAGES, StageName, WorkerKind, stage_of
from onstream.workers.launcher.model_servers import KINDS as SERVER_KINDS
from onstream.workers.launcher.model_servers import ModelServers, may_ask
from onstream.workers.launcher.process_usage import process_bytes
from onstream.workers.launcher.supervisor import Child, Supervisor
from onstream.workers.launcher.vllm_server_process import ModelServer

EVAL = "eval"
COMMAND = "onstream"


class RunProcesses:
    """Starts the workers, servers and evaluations of `plan` as children of `supervisor`.

    `arguments` are the settings' sources, which every process is given. `finished` says whether the
    run is over.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        arguments: Sequence[str],
        supervisor: Supervisor,
        finished: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self.servers = ModelServers(settings, plan, self._log_file)
        self.trainer: Child | None = None
        self._plan = plan
        self._arguments = arguments
        self._supervisor = supervisor
        self._finished = finished
        self._gpus = placement(settings, plan, gpus_found()) or {}

    @property
    def done(self) -> bool:
        """Whether every worker and every evaluation has done its work."""
        children = self._supervisor.children
        return all(child.done for child in children if child.kind not in SERVER_KINDS)

    @property
    def running_workers(self) -> list[Child]:
        """The live workers and evaluations, but for the trainer."""
        apart = (*SERVER_KINDS, "trainer")
        return [child for child in self._supervisor.running() if child.kind not in apart]

    @property
    def running_servers(self) -> list[Child]:
        """The live servers of models."""
        return self._supervisor.running(*SERVER_KINDS)

    @property
    def running_evaluations(self) -> list[Child]:
        """The live processes that answer held-out prompts."""
        return self._supervisor.running(EVAL, "jobs")

    def alive(self, kinds: Sequence[str]) -> int:
        """How many live workers there are of `kinds`."""
        return len(self._supervisor.running(*kinds))

    def unfinished(self, kinds: Sequence[str]) -> int:
        """How many workers of `kinds` have not done their work, alive or about to be restarted."""
        children = self._supervisor.children
        return sum(child.kind in kinds and not child.done for child in children)

    def count(self, kind: str) -> int:
        """How many workers of `kind` there shall be."""
        children = self._supervisor.children
        return sum(child.kind == kind and not child.dismissed for child in children)

    def bytes_of_one(self, kind: WorkerKind) -> int:
        """The memory of the largest live worker of `kind`; 0 where none lives."""
        running = self._supervisor.running(kind)
        return max((process_bytes(child.pid) for child in running if child.pid), default=0)

    @property
    def threads(self) -> int:
        """The threads of each worker that computes tensors."""
        return int(self._supervisor.environ["OMP_NUM_THREADS"].split(",")[0])

    @property
    def workers_by_stage(self) -> dict[StageName, int]:
        """How many workers each stage that takes work shall have here, of all kinds together."""
        counts: dict[StageName, int] = {}
        for stream in self._plan.streams:
            stage = stage_of(stream)
            if stage in WORK_STAGES:
                here = sum(self.count(kind) for kind in self._plan.consumers(stream))
                counts[stage] = counts.get(stage, 0) + here
        return counts

    def add_worker(self, kind: WorkerKind) -> Child:
        """Start one more worker of `kind`, which the run can do without."""
        # One that was taken away keeps its name, under which it may still hold something.
        index = sum(child.kind == kind for child in self._supervisor.children)
        child = self._worker(kind, index)
        child.optional = True
        return self._supervisor.start(child)

    def take_away(self, child: Child) -> None:
        """Have a worker finish what it has in hand, and leave the run."""
        self._supervisor.dismiss(child)

    def start(self) -> Iterator[str]:
        """Start the servers, then the workers. Yields what there is to say of it."""
        for server in self.servers.all:
            self._start_server(server)
            model = self.servers.model(server)
            yield f"{server.name}: vLLM loads {model} (its log: {self._log_file(server.name)})"
        for kind in START_ORDER:
            for index in range(self._plan.workers.get(kind, 0)):
                child = self._supervisor.start(self._worker(kind, index))
                if kind == "trainer":
                    self.trainer = child
        for teacher, named in self._plan.named_teachers.items():
            for index in range(named.workers):
                self._supervisor.start(self._named_teacher(teacher, named.kind, index))

    def evaluate(self, version: int) -> None:
        """Evaluate a policy version in a process of its own, unless it is or was evaluated."""
        if not self._settings.eval.samples or self._is_asked_of_jobs(version):
            return
        rows = read_rows(self._settings.run_dir / "evals.jsonl")
        if version in {row["version"] for row in rows}:
            return
        arguments = [EVAL, str(self._settings.run_dir), "--version", str(version)]
        child = self._child(f"{EVAL}-{version}", EVAL, arguments)
        child.once = True
        self._supervisor.start(child)

    def _is_asked_of_jobs(self, version: int) -> bool:
        """Whether the trainer asks a jobs worker to evaluate `version`."""
        interval = self._settings.eval.interval
        elsewhere = self._settings.deployment.count_elsewhere("jobs")
        has_jobs = self._plan.workers.get("jobs") or elsewhere
        return bool(has_jobs and interval and version and version % interval == 0)

    def _start_server(self, server: ModelServer) -> None:
        arguments = [server.kind, *self._arguments, "--port", str(server.port)]
        child = self._child(server.name, server.kind, arguments)
        child.environ = self._environ(self.servers.place(server))
        # What keeps it from serving at all, a restart will not mend.
        child.mendable = lambda: server.has_served
        self._supervisor.start(child)
        server.start()

    def _worker(self, kind: WorkerKind, index: int) -> Child:
        """The index-th worker of `kind`.

        One that asks servers waits for them, or for the end of the run.
        """
        servers = self.servers.asked_by(kind, index)
        arguments = ["worker", kind, *self._arguments]
        for override in self.servers.overrides(kind, servers):
            arguments += ["--set", override]
        arguments += ["--slot", f"slot{index}"]
        child = self._child(f"{kind}-{index}", kind, arguments)
        if servers:
            child.may_start = lambda: self._finished() or may_ask(servers)
        else:
            child.environ = self._environ((kind, index))
        return child

    def _named_teacher(self, teacher: str, kind: WorkerKind, index: int) -> Child:
        """The index-th worker of the `teacher` of that name."""
        label = kind_of_named(kind, teacher)
        own = [*label.split(), "--slot", f"slot{index}"]
        arguments = ["worker", own[0], *self._arguments, *own[1:]]
        return self._child(f"{kind}-{teacher}-{index}", label, arguments)

    def _child(self, name: str, kind: str, arguments: Sequence[str]) -> Child:
        return Child(name, kind, COMMAND, arguments, self._log_file(name))

    def _environ(self, place: Place) -> dict[str, str]:
        """The variable that keeps a model to its GPUs.

        None where models run on the CPU, or share GPUs that nobody has counted.
        """
        gpus = gpus_of(self._settings, self._plan, self._gpus, place)
        return {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}

    def _log_file(self, name: str) -> Path:
        return self._settings.run_dir / "logs" / f"{name}.log"
