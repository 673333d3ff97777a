"""The example, with its teacher in a vLLM server that `onstream up` starts, restarts and stops, or
on vLLM in its worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import living, worker
from tests.vllm.test_run import steps

ROOT = Path(__file__).parents[2]
ONSTREAM = (sys.executable, "-m", "onstream")
STEPS = 16


def started(run_dir: Path, said: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """`onstream up` on the example, in batches of all that is under way, so that two runs train on
    the same rollouts.
    """
    every = [
        f"run.dir={run_dir.parent}",
        f"run.name={run_dir.name}",
        "orchestrator.batch_size=32",
        "orchestrator.max_off_policy_steps=0",
    ]
    every += ["eval.samples=0", "deployment.status_interval=0.2", *overrides]
    options = [part for override in every for part in ("--set", override)]
    command = [*ONSTREAM, "up", "examples/reverse-text/onstream.toml", *options]
    with said.open("w") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def servers(run: subprocess.Popen[bytes]) -> list[int]:
    """The processes under `run` that are vLLM's server itself."""
    return [child.pid for child in living(run.pid, "vllm.entrypoints.openai.api_server")]


def group(leader: int) -> set[int]:
    """The live processes of a process group."""
    states = (Path(f"/proc/{pid}/stat") for pid in psutil.pids())
    fields = [state.read_text() for state in states if state.exists()]
    return {
        int(text.split()[0])
        for text in fields
        if (after := text.rpartition(")")[2].split())[2] == str(leader) and after[0] != "Z"
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.rotates("a vLLM server that is started", 1, 2)
def test_the_example_runs_with_a_server_that_is_started_killed_started_again_and_stopped(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "runs" / "served"
    said = tmp_path / "said"
    run = started(run_dir, said, "teacher_inference.engine=vllm", f"trainer.max_steps={STEPS}")
    try:
        while steps(run_dir) < 2:
            assert run.poll() is None, said.read_text()
            time.sleep(0.05)
        [first] = servers(run)
        processes = group(first)
        assert len(processes) > 2, "the server, its guard and its engine"
        os.kill(first, signal.SIGKILL)
        assert run.wait() == 0, said.read_text()
    finally:
        run.terminate()
        run.wait()
    words = said.read_text()
    print(words)
    log = run_dir / "logs" / "teacher-server.log"
    assert f"waiting: teacher-server: loading its model (its log: {log})" in words
    assert f"teacher-server was killed by SIGKILL; restarting it (its log: {log})" in words
    assert words.count("teacher-server: healthy at ") == 2
    assert log.read_text().count("Application shutdown complete") == 1, (
        "the second was told to stop, and did"
    )
    assert group(first) == set() and not any(psutil.pid_exists(pid) for pid in processes)

    address = words.partition("teacher-server: healthy at ")[2].split()[0]
    trained = rows(run_dir)
    assert len(trained) == STEPS
    assert all(row["teacher_kl"] is not None and address in row["scored_by"] for row in trained)
    assert set().union(*(row["scored_by"] for row in trained)) <= {address, "cache"}
    audit = json.loads(
        subprocess.run(
            [*ONSTREAM, "audit", str(run_dir)], capture_output=True, check=True, cwd=ROOT
        ).stdout
    )
    assert (audit["lost"], audit["duplicated"], audit["dead"]) == (0, 0, 0)

    local = tmp_path / "runs" / "local"
    assert started(local, said, "trainer.max_steps=1").wait() == 0, said.read_text()
    here = trained[0]["teacher_kl"]
    there = rows(local)[0]["teacher_kl"]
    print(f"the first batch's teacher_kl is {here} by vLLM and {there} by transformers")
    assert here == pytest.approx(there, abs=1e-4)


@pytest.mark.rotates("a run on vLLM in the teacher's worker", 0, 3)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_student_learns_from_vllm_in_the_teachers_worker_which_is_killed_and_leaves_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # an engine of its own, as on a GPU
    run_dir = tmp_path / "runs" / "in-process"
    said = tmp_path / "said"
    overrides = (
        "teacher_inference.engine=vllm-in-process",
        "orchestrator.batch_size=128",
        "orchestrator.max_off_policy_steps=2",
        "delivery.lease=2",
        "trainer.max_steps=24",
    )
    run = started(run_dir, said, *overrides)
    try:
        while steps(run_dir) < 8:
            assert run.poll() is None, said.read_text()
            time.sleep(0.05)
        first = worker(run.pid, "teacher")
        processes = [first, *first.children(recursive=True)]
        assert any("EngineCore" in process.name() for process in processes)
        os.kill(first.pid, signal.SIGKILL)
        _, left = psutil.wait_procs(processes, timeout=30)
        assert not left, "the engine's process goes with the worker"
        assert run.wait() == 0, said.read_text()
    finally:
        run.terminate()
        run.wait()
    assert said.read_text().count("was killed by SIGKILL") == 1
    trained = rows(run_dir)
    assert len(trained) == 24
    assert all(list(row["scored_by"]) == ["examples/reverse-text/teacher"] for row in trained)
    before = sum(row["teacher_kl"] for row in trained[:4]) / 4
    after = sum(row["teacher_kl"] for row in trained[-4:]) / 4
    print(f"teacher_kl {before:.3f} to {after:.3f}")
    assert 0 < after < before / 2
    command = [*ONSTREAM, "audit", str(run_dir)]
    audit = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)
    assert (audit["lost"], audit["duplicated"], audit["dead"]) == (0, 0, 0)
