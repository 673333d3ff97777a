"""One long run in containers, and all that may happen to it: scaled, killed from the host, stopped,
taken up again, listened at.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.conftest import MakeProject
from tests.compose.project import Project, children, kill, ran, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GROUP_SIZE = 2
"""That of the example."""


@pytest.fixture(scope="module")
def run(project: MakeProject) -> Iterator[Project]:
    """A run of far more steps than it is given time for; the last test says when it is enough."""
    made = project(ONSTREAM_TRAINER__MAX_STEPS="5000", ONSTREAM_EVAL__SAMPLES="64")
    with made.up():
        wait_for(lambda: made.steps() >= 2, f"the first steps; {made.said()[-2000:]}")
        yield made


def redis_cli(run: Project, network: str, *command: str, host: str | None = None) -> str:
    """What a client in another container gets from Redis, its error included."""
    asked = [
        "docker",
        "run",
        "--rm",
        "--network",
        network,
        "--entrypoint",
        "timeout",
        run.variables.get("REDIS_IMAGE", "redis:7-bookworm"),
    ]
    done = subprocess.run(
        [*asked, "10", "redis-cli", "-h", host or "redis", *command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout + done.stderr


def test_a_client_without_the_password_gets_nothing_from_redis(run: Project) -> None:
    for command in (["keys", "*"], ["info"], ["-a", "guess", "keys", "*"]):
        answer = redis_cli(run, f"{run.name}_default", *command)
        assert "NOAUTH" in answer or "WRONGPASS" in answer, answer
        assert "onstream" not in answer


def test_a_client_outside_the_network_does_not_even_reach_redis(run: Project) -> None:
    (redis,) = run.containers("redis")
    address = redis["NetworkSettings"]["Networks"][f"{run.name}_default"]["IPAddress"]
    assert address and not redis["NetworkSettings"]["Ports"].get("6379/tcp")
    assert "NOAUTH" in redis_cli(run, f"{run.name}_default", "ping", host=address)
    assert "NOAUTH" not in redis_cli(run, "bridge", "ping", host=address)


def test_three_verifiers_in_mid_run_share_the_load_within_seconds(run: Project) -> None:
    started = time.monotonic()
    run.compose("up", "-d", "--no-recreate", "--scale", "verifier=3")
    scaled_s = time.monotonic() - started

    def done() -> list[int]:
        return [
            worker["done"]
            for worker in run.status()["workers"]
            if worker["stage"] == "verify" and worker["done"]
        ]

    wait_for(lambda: len(done()) == 3, "three verifiers at work", 60)
    at_work_s = time.monotonic() - started
    print(f"scaled in {scaled_s:.1f} s, all three at work {at_work_s:.1f} s after the command")
    run.gets_on()


def test_without_generators_the_run_waits_says_for_what_and_goes_on(run: Project) -> None:
    said = len(run.said())
    run.compose("up", "-d", "--no-recreate", "--scale", "verifier=3", "--scale", "generator=0")
    assert run.containers("generator") == []
    waits = (
        "generate: [0-9]+ records wait and no worker takes them; "
        "start one with `onstream worker generator [^`]+`"
    )
    wait_for(
        lambda: re.search(waits, run.said()[said:]), "the word that generators are missing", 90
    )
    before = run.steps()
    time.sleep(3)
    assert run.steps() == before
    run.compose("up", "-d", "--no-recreate", "--scale", "verifier=1", "--scale", "generator=1")
    run.gets_on()


@pytest.mark.parametrize(
    "service", ["generator", "verifier", "teacher", "jobs", "trainer", "redis"]
)
def test_a_process_killed_from_the_host_is_started_again(run: Project, service: str) -> None:
    pid = run.worker_pid(service)
    kill(pid)
    killed = time.monotonic()
    wait_for(
        lambda: (
            run.containers(service)[0]["RestartCount"]
            and run.containers(service)[0]["State"]["Running"]
        ),
        f"another {service}",
    )
    run.gets_on()
    print(f"{service}: two further steps {time.monotonic() - killed:.1f} s after the kill")


def test_a_trainer_killed_below_its_launcher_is_started_again_by_that(run: Project) -> None:
    (container,) = run.containers("trainer")
    launcher = run.worker_pid("trainer")
    (trainer,) = (
        pid for pid in children(launcher) if b"trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    kill(trainer)
    run.gets_on()
    assert run.containers("trainer")[0]["RestartCount"] == container["RestartCount"]


def test_docker_kill_counts_as_a_stop_and_docker_start_goes_on(run: Project) -> None:
    (container,) = run.containers("generator")
    ran(["docker", "kill", container["Id"]])
    time.sleep(3)
    assert not run.containers("generator")[0]["State"]["Running"]
    ran(["docker", "start", container["Id"]])
    run.gets_on()


def test_stop_drains_within_30_seconds_and_up_resumes_from_the_last_checkpoint_and_returns(
    run: Project,
) -> None:
    started = time.monotonic()
    run.compose("stop")
    drained_s = time.monotonic() - started
    print(f"stopped in {drained_s:.1f} s")
    assert drained_s < 30
    codes = {
        c["Config"]["Labels"]["com.docker.compose.service"]: c["State"]["ExitCode"]
        for c in run.containers()
    }
    assert set(codes.values()) == {0}, codes
    state = json.loads(max((run.run_dir / "checkpoints").glob("step-*/trainer.json")).read_text())
    assert state["step"] == run.steps() > 20

    run.set(ONSTREAM_TRAINER__MAX_STEPS=str(max(150, run.steps() + 30)))
    run.run_through(within_s=600)
    report = run.report()
    assert report["steps"] == run.steps() == int(run.variables["ONSTREAM_TRAINER__MAX_STEPS"])
    assert [row["step"] for row in run.rows("metrics.jsonl")] == list(range(1, report["steps"] + 1))
    assert report["eval"]["after"] > 0.97
    assert f"stopped at step {state['step']}" in run.said()


def test_after_all_that_nothing_was_lost_and_nothing_trained_twice(run: Project) -> None:
    found = run.audit()
    print(found)
    assert (found["lost"], found["duplicated"]) == (0, 0)
    # Rollouts are dropped one by one and asked for anew in whole groups, so after an odd number of
    # drops one is left over.
    left_over = sum(found["dropped"].values()) % GROUP_SIZE
    assert found["in_flight"] == left_over
    assert found["trained"] == run.steps() * 128
