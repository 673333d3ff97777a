"""One run of the shipped example as separate `onstream worker` processes on a real Redis, under the
blows of a schedule.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.keys import WORKING
from onstream.pipeline.redis.run_state import WorkerState
from onstream.pipeline.run_files.ownership import FILE
from onstream.settings.load import load_settings
from onstream.settings.stages import WorkerKind
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.environment import environment
from onstream.workers.launcher.supervisor import Child, Supervisor, describe_exit
from tests.chaos.schedule import Blow

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/reverse-text/onstream.toml"
KINDS: tuple[WorkerKind, ...] = ("trainer", "teacher", "generator", "verifier", "jobs")
NAME = "reverse-text"
MAX_MEMORY_MB = 256
PATIENCE_S = 300.0  # for anything that is waited for; a machine may be slow
NOT_THE_TRAINERS = ("logs", "redis", "pinned", "evals.jsonl", FILE)
Say = Callable[[str], None]


class Stuck(AssertionError):
    """What should have happened did not."""


class ChaosRun:
    """Starts the workers, deals the blows, restarts what died, and looks at what is left.

    A worker is restarted as by `docker compose` or `onstream up`: by its exit code, after a pause
    that grows while it keeps dying.
    """

    def __init__(self, directory: Path, *, steps: int, eval_interval: int, say: Say) -> None:
        self.directory = directory / NAME
        self.steps = steps
        self.server = EmbeddedRedis(directory / "redis", max_memory_mb=MAX_MEMORY_MB)
        self._given = [
            *(
                f"run.dir={directory}",
                f"trainer.max_steps={steps}",
                f"eval.interval={eval_interval}",
            ),
            *(
                "checkpoint.interval=4",
                "delivery.lease=2",
                "deployment.threads=1",
                f"redis.url={self.server.url}",
            ),
        ]
        self._say = say
        self._started = time.monotonic()
        self._most_steps = 0
        self._slots = 0
        self.timeline: list[str] = []
        self.dealt: Counter[str] = Counter()

    # The run --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Redis and one worker of each kind; all are gone afterwards."""
        self.server.start()
        settings = load_settings([ROOT / EXAMPLE], self._given)
        self.bus = Bus.connect(
            self.server.url, NAME, consumer="chaos", block_s=0.2, connect_timeout_s=60
        )
        environ = environment(settings.deployment, {}, None)
        self.supervisor = Supervisor(environ, settings.deployment.max_restarts, self._note)
        try:
            for kind in KINDS:
                self._start(kind, "slot0")
            yield
        finally:
            self.supervisor.kill()
            self.bus.close()
            self.server.stop()

    def through(self, blows: Sequence[Blow]) -> None:
        """Deal `blows` and see the run to its end."""
        for blow in blows:
            self._wait(lambda step=blow.step: self.step >= step, f"step {blow.step}")  # type: ignore[misc]
            until = time.monotonic() + blow.delay_s
            while time.monotonic() < until:
                self._look()
            self._deal(blow)
        self._wait(
            lambda: all(child.done for child in self.supervisor.children), "the end of the run"
        )

    @property
    def step(self) -> int:
        """The most steps that the run ever had; a killed trainer takes some of them again."""
        metrics = self.directory / "metrics.jsonl"
        if metrics.exists():
            self._most_steps = max(self._most_steps, metrics.read_bytes().count(b"\n"))
        return self._most_steps

    def _start(self, kind: WorkerKind, slot: str) -> Child:
        given = [part for value in self._given for part in ("--set", value)]
        arguments = ["worker", kind, str(ROOT / EXAMPLE), *given, "--slot", slot]
        log = self.directory / "logs" / f"{kind}-{slot}.log"
        return self.supervisor.start(Child(f"{kind}-{slot}", kind, "onstream", arguments, log))

    def _look(self) -> None:
        """Reap and restart, once."""
        self.supervisor.poll(progress=self.step, finished=lambda since: self.bus.state.finished())
        time.sleep(0.02)

    def _wait(self, happens: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while not happens():
            if time.monotonic() > deadline:
                place = f"step {self.step}, {self.bus.state.backlog()}, {self._states()}"
                raise Stuck(f"no {what} within {patience_s:g} s; {place}")
            self._look()

    def _note(self, sentence: str) -> None:
        line = f"{time.monotonic() - self._started:7.1f} s  step {self.step:3}  {sentence}"
        self.timeline.append(line)
        self._say(line)

    def _states(self) -> list[str]:
        return [f"{beat.worker}: {beat.state}, {beat.detail}" for beat in self.bus.state.workers()]

    # The blows ------------------------------------------------------------------------------------

    def _deal(self, blow: Blow) -> None:
        deeds: Mapping[str, Callable[[], None]] = {
            "kill": lambda: self._kill(blow.kind, early=blow.early),
            "kill redis": lambda: self._kill_redis(blow.delay_s * 4),
            "fill redis": self._fill_redis,
            "empty redis": self._empty_redis,
            "stop trainer": self._stop_trainer,
        }
        deeds[blow.deed]()
        self.dealt[blow.kind if blow.deed == "kill" else blow.deed] += 1

    def _child(self, kind: str) -> Child:
        return next(child for child in self.supervisor.children if child.kind == kind)

    def _kill(self, kind: WorkerKind, *, early: bool) -> None:
        """SIGKILL the worker of `kind`: when it is at work, or at once if `early`; of jobs, every
        other time the job's process alone.
        """
        self._wait(
            lambda: self._beat(kind) is not None if not early else self._child(kind).alive,
            f"{kind} to kill",
        )
        pid = self._child(kind).pid
        if pid is None:
            return self._kill(kind, early=early)
        if kind == "jobs":
            return self._kill_jobs(pid)
        beat = self._beat(kind)
        when = f"with {beat.in_hand} records in hand" if beat else "while it starts"
        self._note(f"kill -9 {kind}, {when}")
        os.kill(pid, signal.SIGKILL)

    def _kill_jobs(self, pid: int) -> None:
        """The process of a job that is being done, or the worker with it; the worker alone where no
        job comes.
        """
        deadline = time.monotonic() + 10
        while (
            not (horses := psutil.Process(pid).children())
            and time.monotonic() < deadline
            and self._child("jobs").pid == pid
        ):
            self._look()
        if horses and self.dealt["jobs"] % 2 == 0:
            self._note("kill -9 the process of a job")
            with contextlib.suppress(ProcessLookupError):
                os.kill(horses[0].pid, signal.SIGKILL)
        elif self._child("jobs").pid == pid:
            self._note(f"kill -9 jobs{' in the middle of a job' if horses else ''}")
            os.kill(pid, signal.SIGKILL)

    def _beat(self, kind: str) -> WorkerState | None:
        """The heartbeat of the living worker of `kind`, once it is done with starting."""
        pid = self._child(kind).pid
        return next(
            (
                beat
                for beat in self.bus.state.workers()
                if beat.pid == pid and beat.state == "running"
            ),
            None,
        )

    def _kill_redis(self, away_s: float) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGKILL)
        self._note(f"kill -9 redis, away for {away_s:.1f} s")
        until = time.monotonic() + away_s
        while self.server.alive or time.monotonic() < until:
            time.sleep(0.01)
        self.server.start()

    def _empty_redis(self) -> None:
        self.bus.connection.ask("FLUSHALL")
        self._note("redis emptied: FLUSHALL")

    def _fill_redis(self) -> None:
        """No memory, until what is under way has gone through; a verifier dies and starts
        meanwhile. Then there is room again.
        """
        self._wait(
            lambda: self._beat("trainer") is not None and self._beat("verifier") is not None,
            "trainer at work",
        )
        self.bus.connection.ask("CONFIG", "SET", "maxmemory", 1)
        self._note("redis full: maxmemory 1")
        # The latter where it has not yet issued again what Redis lost before.
        words = ("Redis is full", "waits for room in Redis")
        self._wait(
            lambda: any(one in self._detail("trainer") for one in words), "word of a full Redis"
        )
        issued = self.bus.state.issued()
        self._kill("verifier", early=True)
        self.dealt["verifier"] += 1
        self._wait(
            lambda: self._beat("verifier") is not None, "verifier that starts on a full Redis"
        )
        self._wait(
            lambda: not any(self.bus.state.backlog()[stage] for stage in WORKING),
            "drain of the working streams",
        )
        until = time.monotonic() + 3
        while time.monotonic() < until:
            self._look()
        if self.bus.state.issued() != issued:
            raise Stuck(
                f"tickets were issued on a full Redis: {self.bus.state.issued()} after {issued}"
            )
        self.bus.connection.ask("CONFIG", "SET", "maxmemory", MAX_MEMORY_MB << 20)
        self._note(
            f"redis has room again; {issued} tickets issued, none meanwhile, "
            "the working streams drained"
        )
        self._wait(lambda: self.bus.state.issued() > issued, "tickets on a Redis with room")

    def _detail(self, kind: str) -> str:
        beat = self._beat(kind)
        return beat.detail if beat else ""

    # The stopped trainer --------------------------------------------------------------------------

    def _stop_trainer(self) -> None:
        """SIGSTOP the trainer, let another take the run over and train, and revive the first while
        the other one stands still.
        """
        self._wait(lambda: self._beat("trainer") is not None, "trainer to stop")
        old = self._child("trainer")
        self._freeze(old)
        self.supervisor.children.remove(old)
        self._slots += 1
        new = self._start("trainer", f"slot{self._slots}")
        self._note(f"SIGSTOP {old.name}; {new.name} starts beside it")
        step = self.step
        self._wait(lambda: self.step >= min(step + 2, self.steps), "steps of the successor")
        self._freeze(new)
        before = self._files()
        self._cont(old)
        code = self._ended(old)
        if (changed := self._files()) != before:
            raise Stuck(
                f"the revived trainer touched {sorted(set(before.items()) ^ set(changed.items()))}"
            )
        self._cont(new)
        said = old.log.read_text().rstrip().splitlines()[-1]
        self._note(
            f"SIGCONT {old.name}: it {describe_exit(code)}, "
            f"and touched none of {len(before)} files; it said: {said}"
        )
        if code != 3 or "another trainer took the run over" not in said:
            raise Stuck(f"the revived trainer {describe_exit(code)}: {said}")

    def _freeze(self, child: Child) -> None:
        """Stop a trainer, but not in the middle of a write: its successor would rightly wait for
        it.
        """
        while True:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGSTOP)
            while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)
            if self._no_write_under_way():
                return
            self._cont(child)
            time.sleep(0.01)

    def _no_write_under_way(self) -> bool:
        with (self.directory / FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _cont(self, child: Child) -> None:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGCONT)

    def _ended(self, child: Child) -> int:
        """The exit code of a child that nobody supervises any more."""
        assert child.process is not None
        try:
            return child.process.wait(timeout=60)
        except subprocess.TimeoutExpired as error:
            child.process.kill()
            child.process.wait()
            raise Stuck("the revived trainer has not ended within 60 s") from error

    def _files(self) -> dict[str, str]:
        """Every file that belongs to the trainer, with its digest."""
        found = {}
        for path in self.directory.rglob("*"):
            name = path.relative_to(self.directory).as_posix()
            if path.is_file() and not name.startswith(NOT_THE_TRAINERS):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    # Afterwards -----------------------------------------------------------------------------------

    def audit(self) -> dict[str, Any]:
        """What `onstream audit` finds, the uids themselves."""
        given = [part for value in self._given for part in ("--set", value)]
        command = [
            sys.executable,
            "-m",
            "onstream",
            "audit",
            EXAMPLE,
            *given,
            "--uids",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not done.stdout:
            raise Stuck(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file of the run."""
        path = self.directory / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def exact(self) -> float | None:
        """The share of held-out prompts that the last version answers right; None without one."""
        return next(
            (row["exact"] for row in self.rows("evals.jsonl") if row["version"] == self.steps), None
        )
