"""What `onstream status` says of a run."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from onstream.pipeline import telemetry
from onstream.pipeline.records import PolicyVersion, StageName, Ticket
from onstream.pipeline.redis.bus import Bus, running_server
from onstream.pipeline.redis.image_store import ImageHold
from onstream.pipeline.redis.run_state import VERSION
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Stats
from onstream.settings.load import load_settings
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.settings.sections.run import LogSettings
from onstream.settings.toml import toml_text
from onstream.workers.inspection.status import show, status
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.open_run import open_run
from onstream.workers.launcher.single_launcher import only_launcher
from tests.entries import claim_pending


def ticket(number: int) -> Ticket:
    route: list[StageName] = ["verify", "train"]
    return Ticket(number, group=0, group_size=2, index=0, seed=1, min_policy_version=0, route=route)


def test_a_run_that_nobody_started_waits_for_a_trainer(bus: Bus) -> None:
    state = status(bus)
    assert (state["started"], state["policy_version"], state["issued"]) == (False, None, 0)
    assert state["waits"][0] == "the run has no plan yet: no trainer has started"


def test_status_tells_backlog_hands_heartbeats_versions_and_what_is_waited_for(bus: Bus) -> None:
    lease = bus.lease.acquire(30)
    bus.lease.write_plan(
        lease, make_plan(load_settings(overrides=[f"run.name={bus.run}"], environ={})).encode()
    )
    bus.lease.announce(
        lease, PolicyVersion(number=3, digest="d", path="policies/000003", size_bytes=1)
    )
    assert bus.lease.issue(lease, 0, [ticket(1), ticket(2)], max_backlog=10)
    bus.state.mark_ready("train")
    assert len(bus.streams.read("generate", 1)) == 1
    bus.state.write_heartbeat("train", Stats(done=5, detail="trains step 4"))
    state = status(bus)
    assert state["route"] == ["generate", "verify", "train"]
    assert state["policy_version"] == 3
    assert state["issued"] == 2
    assert not state["finished"]
    oldest_s = state["stages"]["generate"].pop("oldest_in_hand_s")
    assert 0 < oldest_s < 10
    assert state["stages"]["generate"] == {"ready": False, "backlog": 2, "in_hand": 1}
    assert state["stages"]["train"] == {
        "ready": True,
        "backlog": 0,
        "in_hand": 0,
        "oldest_in_hand_s": None,
    }
    [worker] = state["workers"]
    assert worker["worker"] == "tester"
    assert worker["stage"] == "train"
    assert worker["done"] == 5
    assert worker["detail"] == "trains step 4"
    assert worker["holds"] == 1
    assert worker["version"] == state["version"] == VERSION
    assert state["gone"] == []
    assert state["last_dead"] is None
    assert any("generate" in sentence for sentence in state["waits"])


def test_status_tells_what_images_take(bus: Bus) -> None:
    assert bus.lease.issue(bus.lease.acquire(30), 0, [ticket(1)], max_backlog=10)
    (entry,) = bus.streams.read("generate", 1)
    console = Console(file=io.StringIO(), width=200)
    show(status(bus), console)
    images = {"a": b"x" * 1_500_000, "b": b"y" * 600_000}
    bus.images.hold("generate", [ImageHold(entry.id, 1, images)], patience_s=1)
    state = status(bus)
    assert state["images"] == {"held": 2, "bytes": 2_100_000}
    assert "images held" not in console.file.getvalue()
    show(state, console)
    assert "2 images held, 2.1 MB" in console.file.getvalue()


def test_status_tells_who_is_gone_with_what_in_hand_and_what_went_wrong_last(bus: Bus) -> None:
    assert bus.lease.issue(bus.lease.acquire(30), 0, [ticket(1), ticket(2)], max_backlog=10)
    assert len(bus.streams.read("generate", 1)) == 1
    telemetry.configure("generate", "tester", bus.run, LogSettings())
    telemetry.get_logger().error("the engine failed", error="no memory")
    bus.state.write_heartbeat("generate", Stats(detail="see its last error"), state="failed")
    [entry] = claim_pending(bus, "generate")
    letter = Out("dead", 1, b"x", "handed out too often", 4)
    bus.streams.move("generate", [Move(entry.id, [letter])])
    state = status(bus)
    assert state["workers"] == []
    [gone] = state["gone"]
    assert gone["worker"] == "tester"
    assert gone["state"] == "failed"
    assert gone["holds"] == 0
    assert gone["error"] == "the engine failed: no memory"
    assert state["last_dead"]["number"] == 1
    assert state["last_dead"]["stage"] == "generate"
    assert state["last_dead"]["reason"] == "handed out too often"
    out = io.StringIO()
    show(state, Console(file=out, width=200))
    shown = out.getvalue()
    assert re.search(
        r"gone: tester, failed, last heard of [\d.]+ s ago, holds 0; see its last error", shown
    )
    assert "ago: the engine failed: no memory" in shown
    assert "ago: 1 at generate: handed out too often" in shown


def test_names_and_details_are_whole_in_a_narrow_terminal(bus: Bus) -> None:
    detail = "waiting for the teacher at http://teacher.example.com:8000/v1: ConnectError"
    bus.state.write_heartbeat("score", Stats(detail=detail))
    out = io.StringIO()
    show(status(bus), Console(file=out, width=60))
    assert "…" not in out.getvalue()
    assert "".join(detail.split()) in "".join(out.getvalue().split())


def test_the_command_starts_the_redis_of_a_run_that_stands_still(
    tmp_path: Path,
) -> None:
    settings = load_settings(overrides=["run.name=still", f"run.dir={tmp_path}"], environ={})
    server = EmbeddedRedis(settings.run_dir / "redis", max_memory_mb=64)
    server.start()
    try:
        assert running_server(settings.run_dir) == server.url
        with open_run(settings, purpose="test") as bus:
            assert bus.lease.issue(bus.lease.acquire(30), 0, [ticket(1)], max_backlog=10)
    finally:
        server.stop()
    assert running_server(settings.run_dir) is None
    (settings.run_dir / "settings.toml").write_text('[run]\nname = "still"\n')
    command = [sys.executable, "-m", "onstream", "status", str(settings.run_dir)]

    def printed(*options: str) -> str:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        return done.stdout

    assert json.loads(printed("--json"))["issued"] == 1
    assert "run still: not started, policy version none" in printed()
    assert "waits: the run has no plan yet" in printed()


def made_run(directory: Path, *, steps: int, max_steps: int = 4, name: str = "demo") -> Settings:
    """The files that a run of so many steps leaves, on an embedded Redis that knows it."""
    overrides = [f"run.dir={directory}", f"run.name={name}", f"trainer.max_steps={max_steps}"]
    settings = load_settings(overrides=overrides, environ={})
    (settings.run_dir / "checkpoints" / f"step-{steps:06}").mkdir(parents=True)
    (settings.run_dir / "settings.toml").write_text(toml_text(settings))
    plan = make_plan(settings).encode()
    (settings.run_dir / "plan.json").write_bytes(plan)
    server = EmbeddedRedis(settings.run_dir / "redis", max_memory_mb=64)
    server.start()
    try:
        with open_run(settings, purpose="trainer") as bus:
            lease = bus.lease.acquire(30)
            bus.lease.write_plan(lease, plan)
            bus.lease.announce(lease, PolicyVersion(steps, "d", "policies/x", 1))
            assert bus.lease.issue(lease, 0, [ticket(1), ticket(2)], max_backlog=10)
            entries = bus.streams.read("generate", 2)
            bus.streams.move(
                "generate", [Move(e.id, [Out("train", e.number, b"x")]) for e in entries]
            )
            assert len(bus.streams.read("train", 2)) == 2
            for stage in ("generate", "verify", "train"):
                bus.state.mark_ready(stage)
            if steps >= max_steps:
                bus.lease.finish(lease)
            bus.lease.release(lease)
    finally:
        server.stop()
    (settings.run_dir / "trained.jsonl").write_text(
        '{"number":1,"fate":"trained","step":1}\n{"number":2,"fate":"trained","step":1}\n'
    )
    return settings


def told(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-P", "-m", "onstream", "status", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_finished_run_has_nothing_in_hand_and_nobody_ready_and_names_what_comes_next(
    tmp_path: Path,
) -> None:
    run = made_run(tmp_path, steps=4).run_dir
    state = json.loads(told(str(run), "--json", cwd=tmp_path))
    assert (state["phase"], state["finished"], state["step"]) == ("finished", True, 4)
    assert state["stages"]["train"] == {
        "ready": False,
        "backlog": 0,
        "in_hand": 0,
        "oldest_in_hand_s": None,
    }
    shown = told(str(run), cwd=tmp_path)
    assert shown.startswith("run demo: finished at step 4, policy version 4\n")
    assert f"export {run} --out demo-model`" in shown
    assert "waits" not in shown


def test_a_run_that_was_stopped_is_not_called_running_and_says_how_it_goes_on(
    tmp_path: Path,
) -> None:
    run = made_run(tmp_path, steps=2).run_dir
    shown = told(str(run), cwd=tmp_path)
    assert shown.startswith("run demo: stopped at step 2, policy version 2\n")
    assert f"it goes on with `{sys.executable} -m onstream up {run}`" in shown
    assert "start one with" not in shown


@pytest.mark.parametrize("steps", [2, 4], ids=["begun", "ended-and-extended"])
def test_a_run_under_a_launcher_is_running(tmp_path: Path, steps: int) -> None:
    settings = made_run(tmp_path, steps=steps)
    with only_launcher(settings.run_dir):
        assert told(str(settings.run_dir), cwd=tmp_path).startswith("run demo: running, ")


def test_a_copied_run_is_told_from_one_that_never_started(tmp_path: Path) -> None:
    run = made_run(tmp_path, steps=2).run_dir
    copy = tmp_path / "second"
    shutil.copytree(run, copy)
    shown = told(str(copy), cwd=tmp_path)
    assert shown.startswith("run second: copied from run demo")
    assert f"it goes on under its own name with `{sys.executable} -m onstream up {copy}`" in shown


@pytest.mark.parametrize(("steps", "phase"), [(2, "stopped"), (4, "finished")])
def test_files_tell_where_a_run_stands_when_its_redis_is_gone(
    tmp_path: Path, steps: int, phase: str
) -> None:
    run = made_run(tmp_path, steps=steps).run_dir
    shutil.rmtree(run / "redis")
    shown = told(str(run), cwd=tmp_path)
    assert shown.startswith(f"run demo: {phase} at step {steps}, policy version {steps}\n")
    assert "its Redis cannot be asked: " in shown


def test_without_a_run_the_runs_are_listed_and_an_unknown_name_suggests_one(
    tmp_path: Path,
) -> None:
    made_run(tmp_path / "runs", steps=4)
    made_run(tmp_path / "runs", steps=2, name="other")
    rows = json.loads(told("--json", cwd=tmp_path))
    assert rows == [
        {"run": "runs/demo", "phase": "finished", "step": 4, "max_steps": 4},
        {"run": "runs/other", "phase": "stopped", "step": 2, "max_steps": 4},
    ]
    shown = told(cwd=tmp_path).splitlines()
    assert [line.split() for line in shown[1:3]] == [
        ["runs/demo", "finished", "step", "4", "of", "4"],
        ["runs/other", "stopped", "step", "2", "of", "4"],
    ]
    assert "Did you mean runs/demo?" in told("dmeo", cwd=tmp_path)
