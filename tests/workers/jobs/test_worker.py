"""The jobs worker as a process, on a real Redis: limits that hold, retries, drains, and its end
with the run's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from rq import Queue

import tests.workers.jobs.worker_process as misbehaving
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.job_queue import (
    JobKind,
    JobQueue,
    JobRow,
    ask_pinned,
    current_function,
    queue_name,
)
from onstream.pipeline.weights.directory_store import pinned
from onstream.settings.root import Settings
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from tests.waiting import LONGEST_S, until

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def settings(bus: Bus, tmp_path: Path) -> Settings:
    jobs = {"time_limit": 60, "retries": 1, "sweep_interval": 0}
    return Settings.model_validate(
        {"run": {"name": bus.run, "dir": str(tmp_path)}, "jobs": jobs, "delivery": {"drain": 0.3}}
    )


@pytest.fixture
def jobs(redis_url: str, settings: Settings) -> Iterator[JobQueue]:
    settings.run_dir.mkdir()
    with JobQueue(redis_url, settings.run.name, settings.jobs) as jobs:
        yield jobs


@pytest.fixture
def start(redis_url: str, settings: Settings) -> Iterator[Start]:
    """Starts a worker; what still runs in the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def worker(**changes: Any) -> subprocess.Popen[bytes]:
        given = settings.model_dump(mode="json")
        for section, values in changes.items():
            given[section] |= values
        text = Settings.model_validate(given).model_dump_json()
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.workers.jobs.worker_process", redis_url, text]
            )
        )
        return started[-1]

    yield worker
    for process in started:
        process.kill()
        process.wait()


def ask(jobs: JobQueue, kind: str, *args: Any, key: str = "1") -> bool:
    assert kind in misbehaving.NAMES
    return jobs.ask(kind, key, *args)  # type: ignore[arg-type]


def ended(jobs: JobQueue, kind: str) -> JobRow:
    rows = until(
        lambda: [
            row
            for row in jobs.rows()
            if row.kind == kind and row.status in ("finished", "failed", "stopped")
        ]
    )
    return rows[0]  # type: ignore[no-any-return]


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended before it was read, or meanwhile
        return True


def test_a_job_that_ignores_its_limit_is_killed_with_its_children_and_the_worker_goes_on(
    jobs: JobQueue, start: Start, tmp_path: Path
) -> None:
    jobs.ask("hang", "1", str(tmp_path / "pids"), time_limit_s=3)  # type: ignore[arg-type]
    ask(jobs, "answer", 7)
    worker = start()
    row = ended(jobs, "hang")
    assert (row.status, row.tries) == ("failed", 2)
    assert "signal 9" in row.reason
    until(lambda: all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split()))
    assert ended(jobs, "answer").result == {"value": 7}
    assert worker.poll() is None


def test_what_a_job_leaves_behind_is_killed_when_it_has_ended(
    jobs: JobQueue, start: Start, tmp_path: Path
) -> None:
    ask(jobs, "daemon", str(tmp_path / "pid"))
    start()
    assert ended(jobs, "daemon").result == "left"
    until(lambda: gone(int((tmp_path / "pid").read_text())))


def test_a_job_that_fails_is_tried_again(jobs: JobQueue, start: Start, tmp_path: Path) -> None:
    ask(jobs, "flaky", str(tmp_path / "failed"))
    start()
    row = ended(jobs, "flaky")
    assert (row.status, row.tries, row.result) == ("finished", 2, "done")


def test_what_only_the_user_can_mend_is_not_tried_again(
    jobs: JobQueue, start: Start, tmp_path: Path
) -> None:
    ask(jobs, "hopeless", str(tmp_path / "tries"))
    start()
    row = ended(jobs, "hopeless")
    assert (row.status, row.tries) == ("failed", 1)
    assert "this; expected that. Mend it." in row.reason
    assert (tmp_path / "tries").read_text() == "tried\n"


def test_a_job_is_asked_for_once_and_anew_only_where_that_is_wanted(
    jobs: JobQueue, start: Start
) -> None:
    assert ask(jobs, "answer", 1)
    assert not ask(jobs, "answer", 2)
    assert not jobs.ask("answer", "1", 2, again=True)  # type: ignore[arg-type]  # it is still waiting
    assert ask(jobs, "answer", 3, key="2")
    start()
    until(
        lambda: (
            jobs.idle()
            and len(jobs.rows()) == 2
            and all(row.status == "finished" for row in jobs.rows())
        )
    )
    assert {row.key: row.result["value"] for row in jobs.rows()} == {"1": 1, "2": 3}
    assert not ask(jobs, "answer", 4)
    assert jobs.ask("answer", "1", 5, again=True)  # type: ignore[arg-type]


def test_a_worker_told_to_stop_gives_the_job_in_hand_back_uncounted(
    jobs: JobQueue, start: Start, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    ask(jobs, "slow", str(begun))
    worker = start(jobs={"retries": 0})
    until(begun.exists)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(LONGEST_S) == 0
    assert [row.status for row in jobs.rows()] == ["queued"]
    start()
    assert ended(jobs, "slow").result == "done"


def test_a_worker_ends_by_itself_when_the_run_has_and_nothing_is_left_to_do(
    jobs: JobQueue, start: Start, bus: Bus
) -> None:
    ask(jobs, "answer", 1)
    bus.lease.finish(bus.lease.acquire(30))
    assert start().wait(LONGEST_S) == 0
    assert ended(jobs, "answer").status == "finished"


def test_a_worker_that_is_up_before_a_finished_run_goes_on_stays(
    jobs: JobQueue, start: Start, bus: Bus
) -> None:
    lease = bus.lease.acquire(30)
    bus.lease.announce(lease, PolicyVersion(2, "digest 2", "policies/x", 1))
    bus.lease.finish(lease)
    worker = start(trainer={"max_steps": 4})
    beats = set[bytes]()
    # In its third beat, a worker that believed the run to be over would end.
    until(lambda: beats.update(bus.connection.ask("HVALS", bus.keys.workers)) or len(beats) > 3)
    assert worker.poll() is None
    bus.lease.release(lease)
    bus.lease.finish(bus.lease.acquire(30))
    assert worker.wait(LONGEST_S) == 0


def test_it_says_in_heartbeats_that_it_lives(jobs: JobQueue, start: Start, bus: Bus) -> None:
    start()
    [state] = until(bus.state.workers)
    assert (state.stage, state.detail) == ("jobs", "waits for jobs")


def test_a_function_that_is_no_job_of_ours_is_not_called(
    jobs: JobQueue, start: Start, bus: Bus, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    Queue(queue_name(bus.run), connection=jobs.queue.connection, serializer="json").enqueue(
        "os.unlink", str(victim)
    )
    start()
    [row] = until(lambda: [row for row in jobs.rows() if row.status == "failed"])
    assert "a job that calls os.unlink" in row.reason
    assert victim.exists()


def test_a_job_that_the_version_before_has_queued_is_done(
    jobs: JobQueue, start: Start, bus: Bus
) -> None:
    # given: a job as the version before wrote it, with its path of the function
    queue = Queue(queue_name(bus.run), connection=jobs.queue.connection, serializer="json")
    queue.enqueue("workers.jobs.tasks.sweep", meta={"kind": "sweep", "key": "1"})
    # when
    start()
    # then
    row = ended(jobs, "sweep")
    assert (row.status, row.result) == (
        "finished",
        {"consumers": 0, "pins": [], "dead": {}, "backlog": {}},
    )


def test_every_kind_of_job_of_the_version_before_has_its_function() -> None:
    for kind in get_args(JobKind):
        function = current_function(f"workers.jobs.tasks.{kind}")
        assert function == f"onstream.workers.jobs.functions.{kind}"
    assert current_function("workers.jobs.tasks.unlink") is None
    assert current_function("os.unlink") is None


def test_a_sweep_runs_once_an_interval_and_tells_of_dead_letters(
    jobs: JobQueue, start: Start, bus: Bus
) -> None:
    fields = {
        "n": 1,
        "b": b"",
        "stage": "verify",
        "why": "4 times in vain",
        "deliveries": 4,
        "worker": "w",
    }
    bus.connection.ask(
        "XADD", bus.keys.dead, "*", *(part for pair in fields.items() for part in pair)
    )
    for _ in range(2):
        start(jobs={"sweep_interval": 86400})
    row = ended(jobs, "sweep")
    assert row.result["dead"] == {"# times in vain": 1}
    assert len([row for row in jobs.rows() if row.kind == "sweep"]) == 1


def test_pruning_lets_go_of_versions_kept_for_jobs_that_are_gone(
    jobs: JobQueue, start: Start, settings: Settings
) -> None:
    for version in range(7):
        (settings.run_dir / "policies" / f"{version:06d}").mkdir(parents=True)
    ask_pinned(jobs, settings.run_dir, "evaluate", 1, "1", 1)
    [job] = jobs.queue.jobs
    job.delete()
    assert pinned(settings.run_dir) == {1}
    jobs.ask("prune", "now")
    start()
    assert ended(jobs, "prune").result == {"pins": [1], "policies": [1, 2], "checkpoints": []}
    assert pinned(settings.run_dir) == set()


def test_pruning_leaves_the_directories_to_a_trainer_that_is_at_work(
    jobs: JobQueue, start: Start, bus: Bus, settings: Settings
) -> None:
    (settings.run_dir / "policies" / "000001").mkdir(parents=True)
    lease = bus.lease.acquire(60)
    jobs.ask("prune", "now")
    start()
    assert ended(jobs, "prune").result == {"pins": [], "policies": [], "left_to": lease.holder}


def test_a_worker_that_is_killed_loses_no_job(jobs: JobQueue, start: Start, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    ask(jobs, "slow", str(begun))
    first = start()
    until(begun.exists)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    registry = jobs.queue.started_job_registry
    assert registry.get_job_and_execution_ids(cleanup=False)
    assert not jobs.idle()
    # what another worker's maintenance does once the execution's lease is over
    registry.cleanup(timestamp=time.time() + 3600)
    start()
    assert ended(jobs, "slow").result == "done"


def test_a_worker_waits_while_redis_is_full_and_does_its_jobs_when_there_is_room_again(
    tmp_path: Path, settings: Settings
) -> None:
    server = EmbeddedRedis(tmp_path / "redis", max_memory_mb=64)
    url = server.start()
    bus = Bus.connect(url, settings.run.name, consumer="tester", block_s=0.2, connect_timeout_s=5)
    command = [
        sys.executable,
        "-m",
        "tests.workers.jobs.worker_process",
        url,
        settings.model_dump_json(),
    ]
    with (
        JobQueue(url, settings.run.name, settings.jobs) as jobs,
        subprocess.Popen(command) as worker,
    ):
        try:
            until(lambda: [beat for beat in bus.state.workers() if beat.stage == "jobs"])
            bus.connection.ask("CONFIG", "SET", "maxmemory", 1)
            until(
                lambda: [
                    beat
                    for beat in bus.state.workers()
                    if beat.detail == "waits for room in Redis, which is full"
                ]
            )
            bus.connection.ask("CONFIG", "SET", "maxmemory", 64 << 20)
            assert ask(jobs, "answer", 7)
            assert ended(jobs, "answer").status == "finished"
            worker.terminate()
            assert worker.wait() == 0
        finally:
            worker.kill()
            bus.close()
            server.stop()
