"""`onstream up` on a real Redis with real processes; the workers are stand-ins that start at once
and die when told to.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus, running_server
from onstream.pipeline.stage import Stats
from onstream.settings.load import load_settings
from onstream.workers.launcher import disk_watch, launcher, processes, shutdown
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.environment import default_threads, environment
from tests.workers.launcher.stand_in import take_lease
from tests.workers.launcher.test_preflight import make_model


class Run:
    """A run in `tmp_path`: the command's arguments, what it printed, and its files."""

    def __init__(self, tmp_path: Path) -> None:
        make_model(tmp_path / "student")
        self.directory = tmp_path / "runs" / "demo"
        self.directory.mkdir(parents=True)
        self.printed = io.StringIO()
        self.overrides = [
            f"run.dir={tmp_path / 'runs'}",
            "run.name=demo",
            f"model.name={tmp_path / 'student'}",
            "trainer.max_steps=5",
        ]

    def up(self, *overrides: str) -> Exit:
        every = [*self.overrides, *overrides]
        settings = load_settings(overrides=every, environ={})
        try:
            return launcher.up(settings, [], every, Console(file=self.printed, width=200))
        finally:
            print(self.printed.getvalue())  # pytest shows it when a test fails

    def orders(self, stage: str, words: str) -> None:
        (self.directory / stage).write_text(words)

    def read(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def steps(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def when(self, condition: Callable[[], bool], act: Callable[[], object]) -> None:
        """Do `act` in a thread as soon as `condition` holds."""

        def wait() -> None:
            while not condition():
                time.sleep(0.01)
            act()

        threading.Thread(target=wait, daemon=True).start()

    def pids(self, *words: str) -> list[int]:
        """Live processes of this run whose command line holds all of `words`."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = entry.read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if all(word in line for word in (str(self.directory.parent), *words)):
                found.append(int(entry.parent.name))
        return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(processes, "COMMAND", "tests.workers.launcher.stand_in")
    return Run(tmp_path)


def test_a_run_goes_from_one_command_to_its_report_and_on_from_there(run: Run) -> None:
    assert run.up() == Exit.OK
    report = run.read("report.json")
    assert (report["steps"], report["eval"]["before"], report["eval"]["after"]) == (5, 0.5, 0.55)
    assert report["rollouts"] == 40
    assert set(report["cpu_seconds"]) == {
        "generator",
        "verifier",
        "trainer",
        "eval",
        "redis",
        "launcher",
    }
    assert (run.directory / "curves.png").exists()
    assert load_settings([run.directory], environ={}).trainer.max_steps == 5
    assert "teacher_kl (nats a token)" in run.printed.getvalue()
    assert run.pids() == []
    page = (Path(__file__).parents[3] / "docs" / "run-files.md").read_text()
    left = [path.name + "/" * path.is_dir() for path in run.directory.iterdir()]
    stand_ins = ("generate", "verify", "score", "train")
    left = [name for name in left if not name.startswith(stand_ins) or name == "trained.jsonl"]
    assert [name for name in left if f"`{name}`" not in page] == []

    with pytest.raises(UserError, match=r"run\.seed"):
        run.up("run.seed=9")
    assert load_settings([run.directory], environ={}).run.seed == 0

    assert run.up("trainer.max_steps=8") == Exit.OK
    assert run.read("report.json")["steps"] == 8
    assert [
        json.loads(line)["version"]
        for line in (run.directory / "evals.jsonl").read_text().splitlines()
    ] == [0, 5, 8]


def test_a_finished_run_is_told_at_once_with_its_report_and_starts_no_worker(run: Run) -> None:
    assert run.up() == Exit.OK
    said = run.printed.getvalue()
    assert "finished after step 5" in said
    assert f"export {run.directory} --out demo-model" in said
    logs = {path: path.stat().st_mtime_ns for path in (run.directory / "logs").iterdir()}
    run.printed.truncate(0)
    assert run.up() == Exit.OK
    said = run.printed.getvalue()
    assert "run demo is already finished at step 5" in said
    assert "teacher_kl (nats a token)" in said
    assert {path: path.stat().st_mtime_ns for path in (run.directory / "logs").iterdir()} == logs


def test_a_finished_run_with_other_settings_is_refused_instead_of_posing_as_a_new_one(
    run: Run,
) -> None:
    assert run.up() == Exit.OK
    with pytest.raises(UserError, match="already finished at step 5") as refused:
        run.up("trainer.optim.lr=0.05")
    assert refused.value.exit is Exit.REFUSED
    assert "trainer.optim.lr (here 0.05, the run has " in refused.value.got
    assert "Raise trainer.max_steps above 5, or choose another run.name" in str(refused.value)
    assert load_settings([run.directory], environ={}).trainer.optim.lr != 0.05


def test_a_finished_run_whose_last_evaluation_is_missing_is_evaluated(run: Run) -> None:
    assert run.up() == Exit.OK
    (run.directory / "evals.jsonl").unlink()
    assert run.up() == Exit.OK
    assert run.read("report.json")["eval"]["after"] == 0.55


def test_a_finished_run_goes_on_though_its_workers_are_up_long_before_its_trainer(
    run: Run,
) -> None:
    assert run.up() == Exit.OK
    late = run.directory / "train.late"
    late.touch()
    for stage in ("generate", "verify"):
        (run.directory / f"{stage}.up").unlink()

    def both_are_up() -> bool:
        return all((run.directory / f"{stage}.up").exists() for stage in ("generate", "verify"))

    run.when(both_are_up, late.unlink)
    assert run.up("trainer.max_steps=8", "deployment.max_restarts=0") == Exit.OK
    assert run.read("report.json")["steps"] == 8
    assert "restarting" not in run.printed.getvalue()


def test_a_run_goes_on_from_any_directory_by_its_own_settings(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run.overrides[2] = "model.name=student"
    assert run.up() == Exit.OK
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    settings = load_settings([run.directory], ["trainer.max_steps=8"], environ={})
    more = ["trainer.max_steps=8"]
    console = Console(file=run.printed, width=200)
    assert launcher.up(settings, [run.directory], more, console) == Exit.OK
    assert run.read("report.json")["steps"] == 8


def test_a_worker_that_refuses_stops_the_run_with_its_last_words(run: Run) -> None:
    run.orders("verify", "exit 2 no such scorer")
    run.orders("train", "hold")
    assert run.up() == Exit.USAGE
    assert (
        "the run stops: verifier-0 exited with 2 (usage)\n  no such scorer"
        in run.printed.getvalue()
    )
    assert run.pids() == []


def test_a_worker_that_dies_is_replaced_and_the_run_goes_on(run: Run) -> None:
    run.orders("train", "hold")

    def kill() -> None:
        os.kill(run.pids("worker generator")[0], signal.SIGKILL)
        run.when(
            lambda: "generator-0 was killed" in run.printed.getvalue(),
            (run.directory / "train").unlink,
        )

    run.when(lambda: run.steps() == 3 and (run.directory / "generate.up").exists(), kill)
    assert run.up() == Exit.OK
    assert run.read("report.json")["steps"] == 5


def test_a_redis_that_dies_is_started_again_on_the_same_data(run: Run) -> None:
    run.orders("train", "hold")

    def kill() -> None:
        server = int((run.directory / "redis.pid").read_text())
        os.kill(server, signal.SIGKILL)
        run.when(
            lambda: "the embedded Redis died" in run.printed.getvalue(),
            (run.directory / "train").unlink,
        )

    def note() -> None:
        pids = [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if is_server(entry, run.directory)
        ]
        (run.directory / "redis.pid").write_text(str(pids[0]))
        kill()

    run.when(lambda: run.steps() == 3, note)
    assert run.up() == Exit.OK
    assert run.read("report.json")["steps"] == 5


def test_a_full_disk_under_the_launchers_own_log_does_not_end_the_run(run: Run) -> None:
    (run.directory / "logs").mkdir()
    (run.directory / "logs" / "launcher.log").symlink_to("/dev/full")
    assert run.up() == Exit.OK
    assert run.read("report.json")["steps"] == 5


def test_while_the_disk_is_full_deaths_do_not_count_and_it_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free space is a stub's: no test may fill the disk of the machine."""
    monkeypatch.setattr(disk_watch, "INTERVAL_S", 0.0)
    disk = shutil.disk_usage(run.directory)
    free_again = threading.Event()
    monkeypatch.setattr(
        disk_watch, "free_bytes", lambda path: disk.free if free_again.is_set() else 0
    )
    run.orders("verify", "exit 1 no space left")

    def room() -> None:
        (run.directory / "verify").unlink()
        free_again.set()

    run.when(lambda: run.printed.getvalue().count("verifier-0 exited with 1") == 3, room)
    assert run.up("deployment.max_restarts=1") == Exit.OK
    assert "is full: the run waits until there is room" in run.printed.getvalue()
    assert "has room again: the run goes on" in run.printed.getvalue()


def test_a_trainer_that_was_superseded_leaves_redis_to_its_successor(run: Run) -> None:
    run.orders("train", "hold")
    successor: list[threading.Thread] = []

    def supersede() -> None:
        url = running_server(run.directory)
        assert url is not None
        bus = Bus.connect(url, "demo", consumer="trainer-other", block_s=0.2, connect_timeout_s=5)
        bus.state.write_heartbeat("train", Stats())
        run.orders("train", "exit 3 another trainer took the run over")
        os.kill(run.pids("worker trainer")[0], signal.SIGKILL)
        while "trainer-other has taken the run over" not in run.printed.getvalue():
            time.sleep(0.01)
        lease = take_lease(bus)
        bus.lease.announce(lease, PolicyVersion(5, "digest 5", "", 1))
        bus.lease.finish(lease)
        bus.state.remove_heartbeat()
        bus.close()

    run.when(
        lambda: run.steps() == 3,
        lambda: successor.append(threading.Thread(target=supersede)) or successor[0].start(),
    )
    assert run.up() == Exit.OK
    successor[0].join()
    assert "the run stops" not in run.printed.getvalue()


def is_server(entry: Path, directory: Path) -> bool:
    """Whether the process is the Redis that serves the data of the run."""
    try:
        return (
            "redis-server" in (entry / "cmdline").read_text()
            and (entry / "cwd").resolve() == (directory / "redis").resolve()
        )
    except OSError:
        return False


def test_a_signal_drains_the_workers_first_and_the_trainer_last(run: Run) -> None:
    run.orders("train", "hold")
    run.when(
        lambda: (
            run.steps() == 3
            and all((run.directory / f"{stage}.up").exists() for stage in ("generate", "verify"))
        ),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert run.up() == Exit.OK
    stopped = (run.directory / "stopped").read_text().split()
    assert sorted(stopped[:2]) == ["generate", "verify"]
    assert stopped[2:] == ["train"]
    assert "stopped at step 3" in run.printed.getvalue()
    assert run.pids() == []


def test_after_a_kill_of_the_launcher_nothing_lives_on_and_up_resumes(run: Run) -> None:
    run.orders("train", "hold")
    program = (
        "from onstream.workers.launcher import launcher, processes\n"
        "from onstream.settings.load import load_settings\n"
        "processes.COMMAND = 'tests.workers.launcher.stand_in'\n"
        f"overrides = {run.overrides!r}\n"
        "launcher.up(load_settings(overrides=overrides, environ={}), [], overrides)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as first:
        while run.steps() < 3:
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"pid {first.pid}"):
            run.up()
        first.kill()
    while run.pids("worker"):
        time.sleep(0.01)
    (run.directory / "train").unlink()
    assert run.up() == Exit.OK
    assert run.read("report.json")["steps"] == 5


def test_workers_without_a_trainer_need_a_redis_to_join(run: Run) -> None:
    with pytest.raises(UserError, match=r"no trainer is started here, and there is no redis\.url"):
        run.up('deployment.stages=["generate","verify"]')


def test_a_needed_stage_without_workers_is_said_at_the_start(run: Run) -> None:
    assert run.up("deployment.workers.generator=0") == Exit.OK
    first = run.printed.getvalue().splitlines()[0]
    assert first.startswith("No generator worker is started here: the run waits until one joins")


def test_threads_are_one_on_few_cores_and_shared_out_on_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = {"generator": 2, "verifier": 4, "teacher": 1, "teacher-external": 3, "trainer": 1}
    assert default_threads(workers, cores=4) == 1  # type: ignore[arg-type]
    assert default_threads(workers, cores=64) == 16  # type: ignore[arg-type]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    deployment = load_settings(environ={}).deployment
    assert environment(deployment, {}, None)["OMP_NUM_THREADS"] == "3"
    set_here = deployment.model_copy(update={"threads": 2})
    assert environment(set_here, {}, "unix:///s")["OMP_NUM_THREADS"] == "2"
    assert environment(set_here, {}, "unix:///s")["ONSTREAM_REDIS__URL"] == "unix:///s"


def test_a_redis_that_is_there_for_one_run_is_shut_down_when_its_workers_have_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "MISSED_S", 0.5)  # the stand-ins leave without a word
    server = EmbeddedRedis(tmp_path / "of-the-run", max_memory_mb=64)
    url = server.start()
    try:
        assert run.up(f"redis.url={url}") == Exit.OK
        assert server.alive
        assert run.up(f"redis.url={url}", "redis.shut_down=true") == Exit.OK
        assert not server.alive
    finally:
        server.stop()
