"""The supervisor with real processes. The child is a stand-in, told to die in ways in which no
worker dies on demand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onstream.pipeline.errors import Exit
from onstream.workers.launcher.process_usage import process_cpu_seconds
from onstream.workers.launcher.supervisor import (
    Child,
    ChildFailed,
    Supervisor,
    describe_exit,
    pause_before_restart_s,
)

OBEDIENT = "tests.workers.launcher.obedient"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(os.environ, max_restarts=1, say=said.append)
    yield supervisor
    supervisor.kill()


def until(condition: Callable[[], bool], poll: Callable[[], None] = lambda: None) -> None:
    """Poll until `condition` holds; the test's own time limit ends it otherwise."""
    while not condition():
        poll()
        time.sleep(0.005)


def start(supervisor: Supervisor, tmp_path: Path, *arguments: str, once: bool = False) -> Child:
    log = tmp_path / "logs" / "verify-0.log"
    return supervisor.start(Child("verify-0", "verify", OBEDIENT, arguments, log, once=once))


def poll(
    supervisor: Supervisor, *, progress: int = 0, over: bool | None = False
) -> Callable[[], None]:
    return lambda: supervisor.poll(progress=progress, finished=lambda since: over)


def test_a_worker_that_is_killed_is_started_again(
    supervisor: Supervisor, tmp_path: Path, said: list[str]
) -> None:
    up = tmp_path / "up"
    child = start(supervisor, tmp_path, "wait", str(up))
    until(up.exists)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: child.alive and child.pid != first, poll(supervisor))
    assert child.restarts == 1
    assert said == [f"verify-0 was killed by SIGKILL; restarting it (its log: {child.log})"]


def test_deaths_without_progress_end_the_run_with_the_reason_and_the_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    child = start(supervisor, tmp_path, "exit", "1", "out of", "luck")
    with pytest.raises(ChildFailed) as failure:
        until(lambda: False, poll(supervisor, progress=3))
    assert (
        failure.value.reason
        == "verify-0 exited with 1 (failed), 2 times in a row without progress of the run"
    )
    assert failure.value.log == ["out of luck", "out of luck", f"(its log: {child.log})"]
    assert failure.value.exit == Exit.FAILED


def test_progress_between_two_deaths_forgives_the_first(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    child = start(supervisor, tmp_path, "die")
    progress = iter(range(1000))
    until(
        lambda: child.restarts == 4,
        lambda: supervisor.poll(progress=next(progress), finished=lambda since: False),
    )
    assert child.deaths <= 1


@pytest.mark.parametrize("code", [Exit.USAGE, Exit.REFUSED])
def test_a_worker_that_refuses_is_never_restarted(
    supervisor: Supervisor, tmp_path: Path, code: Exit
) -> None:
    child = start(supervisor, tmp_path, "exit", str(code.value), "no such directory")
    with pytest.raises(ChildFailed) as failure:
        until(lambda: False, poll(supervisor))
    assert (failure.value.exit, failure.value.log, child.restarts) == (
        code,
        ["no such directory", f"(its log: {child.log})"],
        0,
    )


def test_a_clean_exit_waits_until_it_is_known_whether_the_run_is_over(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    child = start(supervisor, tmp_path, "exit", "0")
    until(lambda: not child.alive, poll(supervisor, over=None))
    poll(supervisor, over=None)()
    assert not child.done
    poll(supervisor, over=True)()
    assert child.done
    assert child.restarts == 0


def test_a_worker_stopped_from_outside_in_the_middle_of_a_run_is_started_again(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    up = tmp_path / "up"
    child = start(supervisor, tmp_path, "wait", str(up))
    until(up.exists)
    os.kill(child.pid or 0, signal.SIGTERM)
    until(lambda: child.restarts == 1, poll(supervisor, over=False))
    assert child.alive


def test_what_runs_once_is_done_at_its_clean_exit_though_the_run_goes_on(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    child = start(supervisor, tmp_path, "exit", "0", once=True)
    until(lambda: child.done, poll(supervisor, over=False))
    assert child.restarts == 0


def test_a_drain_waits_for_those_that_stop_and_kills_the_rest(
    supervisor: Supervisor, tmp_path: Path, said: list[str]
) -> None:
    children = [
        start(supervisor, tmp_path, action, str(tmp_path / action)) for action in ("wait", "ignore")
    ]
    until(lambda: all((tmp_path / action).exists() for action in ("wait", "ignore")))
    supervisor.drain(children, within_s=0.3, hurry=lambda: False, tick=lambda: time.sleep(0.01))
    assert supervisor.running() == []
    assert said == ["killed verify-0, which had not stopped"]
    poll(supervisor)()
    assert supervisor.running() == []


def test_a_second_request_to_stop_kills_at_once(supervisor: Supervisor, tmp_path: Path) -> None:
    child = start(supervisor, tmp_path, "ignore", str(tmp_path / "up"))
    until((tmp_path / "up").exists)
    supervisor.drain([child], within_s=None, hurry=lambda: True, tick=lambda: None)
    assert not child.alive


def test_a_worker_that_is_dismissed_stops_and_is_not_started_again(
    supervisor: Supervisor, tmp_path: Path, said: list[str]
) -> None:
    up = tmp_path / "up"
    child = start(supervisor, tmp_path, "wait", str(up))
    until(up.exists)
    supervisor.dismiss(child)
    until(lambda: child.done, poll(supervisor))
    assert (child.alive, child.restarts, said) == (False, 0, [])


def test_the_run_goes_on_without_an_optional_worker_that_cannot_work(
    supervisor: Supervisor, tmp_path: Path, said: list[str]
) -> None:
    log = tmp_path / "verify-1.log"
    child = Child("verify-1", "verify", OBEDIENT, ["exit", "2"], log, optional=True)
    supervisor.start(child)
    until(lambda: child.done, poll(supervisor))
    assert said == [f"verify-1 exited with 2 (usage); the run goes on without it (its log: {log})"]


def test_cpu_seconds_of_a_live_worker_have_those_of_its_own_live_children(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    busy = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", busy], start_new_session=True) as parent:
        until(lambda: process_cpu_seconds(parent.pid) > 0.1)
        os.killpg(parent.pid, signal.SIGKILL)


def test_cpu_seconds_are_kept_of_processes_that_have_ended(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    child = start(supervisor, tmp_path, "exit", "0")
    until(lambda: not child.alive, poll(supervisor, over=None))
    assert supervisor.cpu_seconds() == {"verify": child.cpu_s}
    assert child.cpu_s > 0.005


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    up = tmp_path / "up"
    program = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from onstream.workers.launcher.supervisor import Child, Supervisor\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        f"child = Child('a', 'a', {OBEDIENT!r}, ['ignore', {str(up)!r}], log)\n"
        "supervisor = Supervisor(os.environ, 1, print)\n"
        "supervisor.start(child)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as launcher:
        until(lambda: up.exists() and up.read_text() != "")
        child = int(up.read_text())
        os.kill(launcher.pid, signal.SIGKILL)
    until(
        lambda: (
            not Path(f"/proc/{child}").exists()
            or "State:\tZ" in Path(f"/proc/{child}/status").read_text()
        )
    )


def test_the_pauses_before_restarts_grow_to_a_bound() -> None:
    assert [pause_before_restart_s(deaths) for deaths in (1, 2, 3, 4, 20)] == [
        0.0,
        0.5,
        1.0,
        2.0,
        10.0,
    ]


def test_exits_are_described_in_words() -> None:
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(4) == "exited with 4 (stuck)"
    assert describe_exit(77) == "exited with 77 (unknown)"
