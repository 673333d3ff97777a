"""The vLLM servers of teacher and student under the launcher. Where a whole run is made, vLLM's
place is taken by a stand-in, `stand_in.py`, that starts at once, dies when told to, and has a child
process that would outlive it; tests/vllm makes the same runs with vLLM itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onstream.pipeline.errors import Exit
from onstream.settings import engines
from onstream.settings.chat_templates import arguments_of
from onstream.settings.load import load_settings
from onstream.settings.plan import differences, make_plan
from onstream.workers.launcher import processes
from onstream.workers.launcher.model_servers import (
    TEACHER_SERVER,
    student_overrides,
    teacher_overrides,
)
from onstream.workers.launcher.vllm_server_process import HOST, ModelServer
from tests.workers.launcher.test_launcher import Run

SERVED = (
    "teacher_inference.engine=vllm",
    "deployment.num_teacher_gpus=2",
    "trainer.loss.teacher_tau=0.5",
    "deployment.status_interval=0.1",
)
ORDERS = TEACHER_SERVER
TWO_STUDENTS = (
    "inference.engine=server",
    "deployment.num_infer_gpus=2",
    "deployment.status_interval=0.1",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(processes, "COMMAND", "tests.workers.launcher.stand_in")
    monkeypatch.setattr(engines, "vllm_importable", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = Run(tmp_path)
    made.orders("train", "hold")
    return made


def unfolded(text: str) -> str:
    """`text` without white space: a line with a long path is folded somewhere in it."""
    return "".join(text.split())


def addresses(run: Run) -> list[str]:
    """Where the server was said to be healthy, each time that it was said."""
    return re.findall(r"teacher-server: healthy at (\S+) ", run.printed.getvalue())


def test_its_worker_waits_for_its_health_and_asks_it_and_nothing_of_it_is_left(run: Run) -> None:
    up = run.directory / "score.up"
    log = run.directory / "logs" / "teacher-server.log"
    run.orders(ORDERS, "hold")

    def serve() -> None:
        assert not up.exists()
        (run.directory / ORDERS).unlink()
        run.when(up.exists, (run.directory / "train").unlink)

    loading = f"waiting: teacher-server: loading its model (its log: {log})"
    run.when(
        lambda: run.steps() == 3 and unfolded(loading) in unfolded(run.printed.getvalue()), serve
    )
    assert run.up(*SERVED) == Exit.OK
    assert [up.read_text()] == addresses(run)
    assert "score: not ready" in run.printed.getvalue()
    assert "teacher-server" in run.read("report.json")["cpu_seconds"]
    assert (run.directory / "stopped").read_text().split() == ["teacher-server"], (
        "the others end by themselves"
    )
    assert run.pids() == []


def test_a_server_that_is_killed_is_started_again_where_it_was(run: Run) -> None:
    def kill() -> None:
        run.orders(ORDERS, "hold")
        engines = run.pids("time.sleep(600)")
        [server] = run.pids("teacher-server", "--port")
        os.kill(server, signal.SIGKILL)
        run.when(
            lambda: "teacher-server: no longer healthy" in run.printed.getvalue(),
            lambda: go_on(engines),
        )

    def go_on(engines: list[int]) -> None:
        assert not set(engines) & set(run.pids("time.sleep(600)")), (
            "what it left behind is gone before its successor starts"
        )
        (run.directory / ORDERS).unlink()
        run.when(lambda: len(addresses(run)) == 2, (run.directory / "train").unlink)

    run.when(lambda: run.steps() == 3 and (run.directory / "score.up").exists(), kill)
    assert run.up(*SERVED) == Exit.OK
    assert (
        "teacher-server was killed by SIGKILL; restarting it (its log: " in run.printed.getvalue()
    )
    assert len(set(addresses(run))) == 1
    assert run.pids() == []


def test_a_server_that_ends_before_it_ever_served_stops_the_run_with_its_last_words_and_its_log(
    run: Run,
) -> None:
    run.orders(ORDERS, "exit 1 no memory for the model")
    assert run.up(*SERVED) == Exit.FAILED
    log = run.directory / "logs" / "teacher-server.log"
    assert (
        "the run stops: teacher-server exited with 1 (failed)\n"
        f"  no memory for the model\n  (its log: {log})" in run.printed.getvalue()
    )
    assert "restarting" not in run.printed.getvalue()
    assert run.pids() == []


def test_a_stopped_run_stops_the_server_after_its_workers_and_before_the_trainer(run: Run) -> None:
    run.when(
        lambda: run.steps() == 3 and (run.directory / "score.up").exists(),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert run.up(*SERVED) == Exit.OK
    stopped = (run.directory / "stopped").read_text().split()
    assert "score" in stopped and stopped[-2:] == ["teacher-server", "train"]
    assert run.pids() == []


@pytest.fixture
def server(tmp_path: Path) -> ModelServer:
    return ModelServer(TEACHER_SERVER, TEACHER_SERVER, tmp_path / "teacher-server.log")


def test_a_port_is_kept_for_the_server_and_given_to_nobody_else(
    server: ModelServer, tmp_path: Path
) -> None:
    other = ModelServer("other", TEACHER_SERVER, tmp_path / "other.log")
    assert other.port != server.port
    with socket.socket() as stranger, pytest.raises(OSError, match="Address already in use"):
        stranger.bind((HOST, server.port))
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        own.bind((HOST, server.port))
        own.listen()
        with socket.create_connection((HOST, server.port)):
            own.accept()[0].close()
    other.stop()
    server.stop()


def test_the_worker_of_the_server_has_the_runs_plan_and_no_budget_of_paid_endpoints(
    server: ModelServer,
) -> None:
    run = ["trainer.loss.teacher_tau=0.5", "teacher_inference.model.name=org/big"]
    paid = [
        f"orchestrator.teacher_model.client.{setting}"
        for setting in ("base_url=https://paid/v1", "max_tokens_per_run=9")
    ]
    of_run = [*run, *paid, "orchestrator.teacher_model.model.name=org/big"]
    beside = load_settings(overrides=[*run, "teacher_inference.max_in_flight=32"], environ={})
    settings = load_settings(
        overrides=[*of_run, *teacher_overrides(beside, make_plan(beside), [server])], environ={}
    )
    assert settings.orchestrator.teacher_model is not None
    client = settings.orchestrator.teacher_model.client
    assert (client.base_url, client.max_in_flight, client.max_tokens_per_run) == (
        (server.base_url,),
        32,
        None,
    )
    for overrides in (run, of_run):
        assert (
            differences(
                make_plan(settings), make_plan(load_settings(overrides=overrides, environ={}))
            )
            == []
        )
    server.stop()


def test_the_worker_of_the_server_renders_with_the_teachers_own_variables(
    server: ModelServer,
) -> None:
    run = [
        "trainer.loss.teacher_tau=0.5",
        "teacher_inference.model.name=org/big",
        'model.chat_template_kwargs={"thinking": false}',
        'teacher_inference.model.chat_template_kwargs={"effort": "none"}',
    ]
    beside = load_settings(overrides=run, environ={})
    asked = teacher_overrides(beside, make_plan(beside), [server])
    settings = load_settings(overrides=[*run, *asked], environ={})
    teacher = settings.orchestrator.teacher_model
    assert teacher is not None
    assert arguments_of(teacher.model, settings) == {"effort": "none"}
    assert differences(make_plan(settings), make_plan(beside)) == []
    server.stop()


def test_the_generator_waits_for_all_servers_of_the_student_asks_them_all_and_leaves_nothing(
    run: Run,
) -> None:
    up = run.directory / "generate.up"
    run.orders("student-server", "hold")

    def go_on() -> None:
        assert not up.exists()
        (run.directory / "student-server").unlink()
        run.when(up.exists, (run.directory / "train").unlink)

    run.when(
        lambda: (
            run.steps() == 3
            and "waiting: student-server-0: loading its model" in run.printed.getvalue()
        ),
        go_on,
    )
    assert run.up(*TWO_STUDENTS) == Exit.OK
    asked = up.read_text().split()
    assert len(set(asked)) == 2
    for index, address in enumerate(asked):
        assert f"student-server-{index}: healthy at {address} " in run.printed.getvalue()
    assert (run.directory / "stopped").read_text().split() == ["student-server"] * 2, (
        "the others end by themselves"
    )
    assert run.pids() == []


def test_the_generator_gives_each_server_what_it_decodes_at_once(server: ModelServer) -> None:
    settings = load_settings(
        overrides=["inference.max_batch=48", "inference.data_parallel_size=2"], environ={}
    )
    asking = load_settings(
        overrides=[*TWO_STUDENTS, *student_overrides(settings, [server])], environ={}
    )
    assert (asking.inference.client.base_url, asking.inference.client.max_in_flight) == (
        (server.base_url,),
        96,
    )
    assert make_plan(asking).student_servers == 0
    server.stop()


def test_a_guarded_group_ends_with_its_first_process_even_when_the_launcher_is_killed(
    tmp_path: Path,
) -> None:
    first = tmp_path / "first"
    second = tmp_path / "second"
    guarded = tmp_path / "guarded.py"
    guarded.write_text(
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from onstream.workers.launcher.die_with_parent import guard_group\n"
        "guard_group()\n"
        f"Path({str(second)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
        f"Path({str(first)!r}).write_text(str(os.getpid()))\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    program = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from onstream.workers.launcher.supervisor import Child, Supervisor\n"
        f"child = Child('a', 'a', 'guarded', [], Path({str(tmp_path / 'log')!r}))\n"
        "Supervisor(os.environ, 1, print).start(child)\n"
        "time.sleep(60)"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    with subprocess.Popen([sys.executable, "-c", program], env=environ) as parent:
        while not (first.exists() and first.read_text()):
            time.sleep(0.01)
        parent.kill()
    for pid in (int(file.read_text()) for file in (first, second)):
        while (
            Path(f"/proc/{pid}").exists()
            and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        ):
            time.sleep(0.01)
