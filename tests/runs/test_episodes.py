"""A whole run of episodes of three turns: workers are killed between turns, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import worker

ROOT = Path(__file__).parents[2]
STEPS = 8
BATCH = 32
SETTINGS = f"""
[run]
name = "episodes"
[model]
name = "examples/reverse-text/student"
[teacher_inference.model]
name = "examples/reverse-text/teacher"
[task]
name = "alphabet-sort"
environment = "sort-turns"
max_episode = 96
[deployment]
device = "cpu"
[delivery]
lease = 2
[eval]
samples = 32
[inference.sampling]
max_completion = 16
[orchestrator]
batch_size = {BATCH}
[trainer]
max_steps = {STEPS}
[trainer.loss]
teacher_tau = 0.5
adv_tau = 1.0
"""


def onstream(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "onstream", *arguments]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.rotates("a run of episodes, or of teachers by name", 1, 3)
def test_episodes_outlive_the_workers_that_play_and_write_them(tmp_path: Path) -> None:
    settings = tmp_path / "episodes.toml"
    settings.write_text(SETTINGS)
    directory = tmp_path / "episodes"
    with (tmp_path / "output").open("w") as output:
        command = onstream("up", str(settings), "--set", f"run.dir={tmp_path}")
        run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        for step, kind in ((1, "environment"), (3, "generator")):
            while len(rows(directory / "metrics.jsonl")) < step:
                assert run.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.02)
            worker(run.pid, kind).kill()
        assert run.wait() == 0, (tmp_path / "output").read_text()
    finally:
        run.kill()
        run.wait()

    audit = subprocess.run(
        onstream("audit", str(directory)), cwd=ROOT, capture_output=True, text=True
    )
    assert audit.returncode == 0, audit.stderr
    found = json.loads(audit.stdout)
    assert found["lost"] == found["duplicated"] == found["dead"] == 0
    assert found["trained"] == STEPS * BATCH
    assert (tmp_path / "output").read_text().count("was killed by SIGKILL") == 2
    metrics = rows(directory / "metrics.jsonl")
    assert all(row["latency_act_s"] is not None and row["unscored"] == 0 for row in metrics)
    assert all(1 < row["turns_mean"] <= 3 for row in metrics)
    evals = rows(directory / "evals.jsonl")
    assert [(row["version"], row["samples"]) for row in evals] == [(0, 32), (STEPS, 32)]
    assert all(1 < row["turns"] <= 3 and row["unscored"] == 0 for row in evals)
    report = json.loads((directory / "report.json").read_text())
    assert report["eval"]["reward"]["after"] == evals[1]["reward"]
    whole = [row for row in rows(directory / "samples.jsonl") if row["finish_reason"] == "stop"]
    roles = ["user", "assistant"] * 2 + ["user"]
    assert whole and all([one["role"] for one in row["messages"]] == roles for row in whole)
