"""One short run of the shipped example, whole.

It has real workers and a real Redis, kills in its middle, and the audit afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onstream.settings.load import load_settings
from onstream.workers.monitoring.exporter import Exporter
from tests.processes import worker
from tests.workers.monitoring.scraping import scrape

ROOT = Path(__file__).parents[2]
STEPS = 30


class Run:
    """`onstream up` on the example, cut short, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        overrides = [
            f"run.dir={directory}",
            f"trainer.max_steps={STEPS}",
            "checkpoint.interval=10",
            "delivery.lease=2",
        ]
        example = "examples/reverse-text/onstream.toml"
        command = [sys.executable, "-m", "onstream", "up", example]
        command += [word for value in overrides for word in ("--set", value)]
        self.directory = directory / "reverse-text"
        self.output = directory / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def step(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_step(self, step: int) -> None:
        while self.step < step:
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def kill(self, kind: str) -> None:
        """SIGKILL the worker of `kind` that lives now."""
        worker(self.process.pid, kind).kill()

    def report(self) -> dict[str, Any]:
        assert self.process.wait() == 0, self.output.read_text()
        report: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        return report

    def audit(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "onstream", "audit", str(self.directory)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    if run.process.poll() is None:
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
def test_the_student_learns_and_nothing_is_lost_though_three_workers_are_killed(run: Run) -> None:
    for step, kind in ((3, "generator"), (6, "verifier"), (9, "teacher")):
        run.wait_for_step(step)
        run.kill(kind)
    exporter = Exporter(load_settings([run.directory], environ={}), "127.0.0.1", 0)
    run.wait_for_step(12)
    live = scrape(exporter.port)
    report = run.report()
    ended = scrape(exporter.port)
    exporter.close()
    found = run.audit()
    assert report["steps"] == STEPS
    assert report["eval"]["after"] > report["eval"]["before"] + 0.1
    assert report["teacher_kl"]["last"] < report["teacher_kl"]["first"] / 2
    assert found["lost"] == found["duplicated"] == found["dead"] == 0
    assert found["trained"] == STEPS * 128
    assert found["issued"] == found["trained"] + sum(found["dropped"].values()) + found["in_flight"]
    assert run.output.read_text().count("was killed by SIGKILL") == 3
    # what Prometheus was told meanwhile, and after the run's Redis had ended with it
    assert live["onstream_run_phase[running]"] == live["onstream_redis_up"] == 1
    assert live["onstream_workers[train]"] == 1
    assert 12 <= live["onstream_step"] < STEPS
    for stage in ("generate", "verify", "score"):
        assert live[f"onstream_stage_handling_seconds_count[{stage}]"] >= 12 * 128
        assert live[f"onstream_backlog_records[{stage}]"] >= 0
    assert live["onstream_rollouts_issued_total"] > live["onstream_rollouts_trained_total"]
    assert ended["onstream_run_phase[finished]"] == 1
    assert ended["onstream_rollouts_trained_total"] == found["trained"]
    assert ended["onstream_rollouts_dropped_total[stale]"] <= found["dropped"]["stale"]
    assert ended["onstream_eval_exact_ratio"] == report["eval"]["after"]
