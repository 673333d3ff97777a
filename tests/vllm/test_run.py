from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vllm.server import VllmServer

STEPS = 8
SETTINGS = """
[run]
name = "external"
dir = "{dir}"
[model]
name = "{student}"
[deployment]
device = "cpu"
status_interval = 0.5
[eval]
samples = 0
[inference.sampling]
max_completion = 16
[orchestrator]
batch_size = 64
[trainer]
max_steps = {steps}
[trainer.loss]
teacher_tau = 1.0
teacher_top_k = 4
[orchestrator.teacher_model.client]
base_url = ["{base_url}"]
breaker_pause = 1
[orchestrator.teacher_model.model]
name = "teacher"
"""


@pytest.mark.slow
def test_a_run_whose_teacher_is_killed_and_started_again_says_what_it_waits_for_and_loses_nothing(
    server: VllmServer, student_dir: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "onstream.toml"
    run_dir = tmp_path / "runs" / "external"
    said = tmp_path / "said"
    settings.write_text(
        SETTINGS.format(
            dir=run_dir.parent, student=student_dir, steps=STEPS, base_url=server.base_url
        )
    )
    onstream = [sys.executable, "-m", "onstream"]
    with said.open("w") as output:
        run = subprocess.Popen(
            [*onstream, "up", str(settings)],
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        while steps(run_dir) < 2:
            assert run.poll() is None, said.read_text()
            time.sleep(0.1)
        server.kill()
        while f"waiting: score: waiting for the teacher: {server.base_url}" not in said.read_text():
            assert run.poll() is None, said.read_text()
            time.sleep(0.1)
        assert steps(run_dir) < STEPS
        server.start()
        assert run.wait() == 0, said.read_text()
    finally:
        run.terminate()
        run.wait()
    audit = json.loads(
        subprocess.run([*onstream, "audit", str(run_dir)], capture_output=True, check=True).stdout
    )
    assert (audit["lost"], audit["duplicated"], audit["dead"]) == (0, 0, 0)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    assert all(set(row["scored_by"]) <= {server.base_url, "cache"} for row in rows)


def steps(run_dir: Path) -> int:
    """How many steps the run has taken."""
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0
