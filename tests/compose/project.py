"""One project of Docker Compose: its directory, its containers, and what its run has written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILES = ("compose.yaml", "compose.tls.yaml", "compose.gpu.yaml", "deploy/redis-tls.conf")
WAIT_S = 300
SETTINGS = "examples/reverse-text/onstream.toml"


def ran(command: Sequence[str], **options: Any) -> str:
    """What `command` wrote; fails with all of it where it does."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def wait_for(happens: Callable[[], Any], what: str, within_s: float = WAIT_S) -> Any:
    """What `happens()` returns once that is true of it."""
    deadline = time.monotonic() + within_s
    while not (found := happens()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.25)
    return found


class Project:
    """A directory with compose.yaml, the examples and an `.env` of `variables`; `files` are further
    compose files.
    """

    def __init__(
        self, directory: Path, variables: Mapping[str, str], files: Sequence[Path] = ()
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        for name in FILES:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
        shutil.copytree(ROOT / "examples", directory / "examples")
        self.files = ["compose.yaml", *map(str, files)]
        self.variables: dict[str, str] = {}
        self.set(**variables)

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def run_dir(self) -> Path:
        return self.directory / "runs" / "reverse-text"

    def set(self, **variables: str) -> None:
        """Write the variables to `.env`, beside those that are there."""
        self.variables |= variables
        (self.directory / ".env").write_text(
            "".join(f"{name}={value}\n" for name, value in self.variables.items())
        )

    def command(self, *arguments: str) -> list[str]:
        program = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        return [
            *program,
            *(part for file in self.files for part in ("-f", file)),
            "-p",
            self.name,
            *arguments,
        ]

    def compose(self, *arguments: str) -> str:
        return ran(self.command(*arguments), cwd=self.directory)

    @contextmanager
    def up(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """`docker compose up` in the background; what it prints is what `said` returns. It is
        stopped at the end, if need be.
        """
        with (self.directory / "up.log").open("ab") as log:
            process = subprocess.Popen(
                self.command("up", *arguments), cwd=self.directory, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(WAIT_S)

    def run_through(self, *arguments: str, within_s: float = WAIT_S) -> None:
        """`docker compose up`, until it returns by itself."""
        with self.up(*arguments) as up:
            assert wait_for(
                lambda: up.poll() is not None,
                f"the end of `up`; it said {self.said()[-3000:]}",
                within_s,
            )
            assert up.returncode == 0, self.said()[-3000:]

    def said(self) -> str:
        return (self.directory / "up.log").read_text(errors="replace")

    def down(self) -> None:
        ran(
            self.command("down", "--volumes", "--remove-orphans", "--timeout", "5"),
            cwd=self.directory,
        )

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """What `docker inspect` tells of the project's containers, stopped ones included."""
        labels = [
            f"com.docker.compose.project={self.name}",
            *([f"com.docker.compose.service={service}"] if service else []),
        ]
        ids = ran(
            ["docker", "ps", "--all", "--quiet", *(f"--filter=label={label}" for label in labels)]
        ).split()
        inspected: list[dict[str, Any]] = (
            json.loads(ran(["docker", "inspect", *ids])) if ids else []
        )
        return inspected

    def services(self) -> set[str]:
        """The services that have a container."""
        return {
            container["Config"]["Labels"]["com.docker.compose.service"]
            for container in self.containers()
        }

    def worker_pid(self, service: str) -> int:
        """The process of a service's one container, as this machine numbers it; not that of the
        `init` which started it.
        """
        (container,) = self.containers(service)
        pid = int(container["State"]["Pid"])
        return next(iter(children(pid)), pid) if container["HostConfig"].get("Init") else pid

    def exec(self, service: str, *command: str) -> str:
        return self.compose("exec", "-T", service, *command)

    def status(self) -> dict[str, Any]:
        """What `onstream status` says."""
        state: dict[str, Any] = json.loads(
            self.exec("jobs", "onstream", "status", SETTINGS, "--json")
        )
        return state

    def audit(self) -> dict[str, Any]:
        """What `onstream audit` says, with a Redis that is started for so long."""
        self.compose("up", "-d", "redis")
        found: dict[str, Any] = json.loads(
            self.compose("run", "--rm", "-T", "trainer", "audit", "runs/reverse-text")
        )
        return found

    def steps(self) -> int:
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / name).read_text().splitlines()]

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "report.json").read_text())
        return found

    def gets_on(self, steps: int = 2) -> None:
        """Wait until so many further steps are taken."""
        before = self.steps()
        wait_for(
            lambda: self.steps() >= before + steps,
            f"{steps} steps after step {before}; {self.said()[-2000:]}",
        )


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(pid: int) -> None:
    """`kill -9`, from outside the container."""
    os.kill(pid, signal.SIGKILL)
