"""Stands in for the command `onstream` where a test needs workers that start in no time and die
when told to.

`worker trainer FILES… --set …` takes a step every 20 ms on a real Redis and writes `metrics.jsonl`;
the other workers wait for the end of the run. `eval RUN --version N` appends to `evals.jsonl`.
`teacher-server` and `student-server` stand in for vLLM: a health page, and a child process that
would outlive it. A file `<run directory>/<stage>` holds what a stage shall do instead: `exit CODE
WORDS` once it has started, or `hold` (train: stay at step 3 until the file is gone; a server: do
not serve until then). While there is `train.late`, the trainer does not take its lease.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import click

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease, LeaseHeld
from onstream.pipeline.redis.run_end import RunEnd
from onstream.pipeline.stage import Stats
from onstream.settings.load import load_settings
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.settings.stages import STAGE_OF, WorkerKind
from onstream.workers.commands.options import settings_sources


@click.group()
def cli() -> None:
    """The stand-in."""


@cli.command()
@click.argument("kind")
@settings_sources
@click.option("--slot", required=True)
def worker(
    kind: WorkerKind, files: tuple[Path, ...], overrides: tuple[str, ...], slot: str
) -> None:
    """Be a worker."""
    settings = load_settings(files, overrides)
    stage = STAGE_OF[kind]
    signal.signal(signal.SIGTERM, lambda *_: leave(settings, stage))
    url = settings.redis.url
    assert url is not None
    bus = Bus.connect(
        url.get_secret_value(),
        settings.run.name,
        consumer=f"{stage}-{slot}",
        block_s=0.2,
        connect_timeout_s=5,
    )
    obey(settings.run_dir / stage)
    bus.state.mark_ready(stage)
    bus.state.write_heartbeat(stage, Stats())
    external = settings.orchestrator.teacher_model
    client = external.client if external else None
    asked = settings.inference.client if stage == "generate" else client
    (settings.run_dir / f"{stage}.up").write_text(" ".join(asked.base_url) if asked else "")
    if stage == "train":
        train(settings, bus)
    else:
        wait_until(RunEnd(bus.state, settings.trainer.max_steps).reached)


def served(files: tuple[Path, ...], overrides: tuple[str, ...], port: int) -> None:
    """Be a server of a model."""
    settings = load_settings(files, overrides)
    name = click.get_current_context().info_name or ""
    signal.signal(signal.SIGTERM, lambda *_: leave(settings, name))
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(settings.run_dir)])
    orders = settings.run_dir / name
    obey(orders)
    wait_until(lambda: not orders.exists())
    Server(("127.0.0.1", port), Healthy).serve_forever()


for command in ("teacher-server", "student-server"):
    cli.command(command)(settings_sources(click.option("--port", type=int, required=True)(served)))


class Server(HTTPServer):
    """Shares its port with whoever keeps it for it, as vLLM does."""

    allow_reuse_port = True


class Healthy(BaseHTTPRequestHandler):
    """Answers every question well."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()


def train(settings: Settings, bus: Bus) -> None:
    """Take the steps that are missing, then end the run."""
    late = settings.run_dir / "train.late"
    wait_until(lambda: not late.exists())
    lease = take_lease(bus)
    bus.lease.reopen(lease)
    bus.lease.write_plan(lease, make_plan(settings).encode())
    metrics = settings.run_dir / "metrics.jsonl"
    done = metrics.read_text().count("\n") if metrics.exists() else 0
    with metrics.open("a") as file:
        for step in range(done + 1, settings.trainer.max_steps + 1):
            time.sleep(0.02)
            row = {
                "step": step,
                "time": time.time(),
                "rollouts": 8,
                "wait_s": 0.01,
                "elapsed_s": 0.02,
                "teacher_kl": 1 / step,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            bus.lease.announce(lease, PolicyVersion(step, f"digest {step}", "", 1))
            if step == 3:
                wait_until(lambda: not (settings.run_dir / "train").exists())
    checkpoint = settings.run_dir / "checkpoints" / f"step-{settings.trainer.max_steps:06}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    bus.lease.finish(lease)


def take_lease(bus: Bus) -> Lease:
    """The trainer's lease, as soon as that of a dead one has run out."""
    while True:
        try:
            return bus.lease.acquire(1)
        except LeaseHeld:
            time.sleep(0.05)


def obey(orders: Path) -> None:
    """Do what the file says, if there is one."""
    words = orders.read_text().split() if orders.exists() else []
    if words[:1] == ["exit"]:
        print(" ".join(words[2:]), file=sys.stderr)
        sys.exit(int(words[1]))


def leave(settings: Settings, stage: str) -> None:
    """Note the order in which the stages were told to stop."""
    with (settings.run_dir / "stopped").open("a") as file:
        file.write(f"{stage}\n")
    sys.exit(0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    while not condition():
        time.sleep(0.01)


@cli.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--version", type=int, required=True)
def evaluate(run: Path, version: int) -> None:
    """Pretend to evaluate."""
    with (run / "evals.jsonl").open("a") as file:
        file.write(
            json.dumps({"version": version, "exact": 0.5 + version / 100, "samples": 8}) + "\n"
        )


if __name__ == "__main__":
    cli()
