"""Verifications as jobs: real verifiers and jobs workers on a real Redis, and what becomes of an
entry when one of them is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.job_queue import JobQueue
from onstream.settings.root import Settings
from onstream.settings.sections.task import TaskSettings
from onstream.workers.jobs.process_tree import descendants
from onstream.workers.verifier.verification_jobs import verify_entry
from tests.fault_workers import LEASE_S, verify
from tests.forkserver import context
from tests.waiting import until
from tests.workers.verifier.own_modules import (
    REWARD,
    SCORER,
    installed_environment,
    write_own_modules,
)
from tests.workers.verifier.test_stage import MISBEHAVING, rollout

RUN_JOBS = """
import sys
from onstream.pipeline.redis.bus import connect
from onstream.settings.root import Settings
from onstream.workers.jobs.worker import run_jobs

settings = Settings.model_validate_json(sys.argv[2])
sys.exit(run_jobs(settings, connect(settings, sys.argv[1], consumer="jobs"), sys.argv[1]))
"""


class Site:
    """One run with its verifiers and jobs workers."""

    def __init__(self, bus: Bus, url: str, directory: Path) -> None:
        self.bus = bus
        self.url = url
        self.directory = directory
        self.processes: list[BaseProcess | subprocess.Popen[bytes]] = []
        self.begun = directory / "begun"
        self.go_on = directory / "go_on"

    def settings(
        self, in_jobs: str = "always", *, timeout: float = 20, retries: int = 1
    ) -> Settings:
        """What all its workers are given."""
        return Settings.model_validate(
            {
                "run": {"name": self.bus.run, "dir": str(self.directory)},
                "task": {"scorer": MISBEHAVING},
                "orchestrator": {"verification": {"timeout": timeout, "in_jobs": in_jobs}},
                "jobs": {"retries": retries, "sweep_interval": 0},
                "delivery": {"lease": LEASE_S, "drain": 0.3},
                "redis": {"url": self.url},
            }
        )

    def verifier(self, name: str, settings: Settings) -> BaseProcess:
        """A verifier, started."""
        text = settings.model_dump_json().replace("**********", self.url)
        process = context().Process(target=verify, args=(name, self.url, text))
        process.start()
        self.processes.append(process)
        return process

    def jobs_worker(self, settings: Settings) -> subprocess.Popen[bytes]:
        """A jobs worker, started."""
        text = settings.model_dump_json().replace("**********", self.url)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.jobs.worker_process", self.url, text]
        )
        self.processes.append(process)
        return process

    def put(self, number: int, **info: Any) -> None:
        """A rollout for the verifiers."""
        self.bus.connection.ask(
            "XADD",
            self.bus.keys.streams["verify"],
            "*",
            "n",
            number,
            "b",
            encode(rollout(number, "an answer", **info)),
        )

    def put_slow(self, number: int) -> None:
        """A rollout whose scorer waits until `go_on` exists."""
        self.put(number, do="wait_to_be_told", begun=str(self.begun), go_on=str(self.go_on))

    def scored(self, count: int) -> dict[int, Rollout]:
        """What went on, by number, once it is `count`."""
        until(lambda: len(self.bus.state.numbers("score")) >= count)
        records = [decode_work(entry.payload) for entry in self.bus.streams.read("score", 100)]
        assert self.bus.state.backlog()["verify"] == 0
        return {record.number: record for record in records if isinstance(record, Rollout)}


@pytest.fixture
def site(bus: Bus, redis_url: str, tmp_path: Path) -> Iterator[Site]:
    site = Site(bus, redis_url, tmp_path)
    yield site
    for process in site.processes:
        process.kill()
        process.join() if isinstance(process, BaseProcess) else process.wait()


def test_a_job_moves_the_entry_on_with_its_verdict_and_runs_once(site: Site) -> None:
    settings = site.settings()
    site.jobs_worker(settings)
    site.verifier("first", settings)
    site.put(1)
    done = site.scored(1)[1]
    assert (done.reward, done.route, [timing.stage for timing in done.timings]) == (
        1.0,
        ["score", "train"],
        ["verify"],
    )
    assert done.timings[0].worker.startswith("job-")
    with JobQueue(site.url, site.bus.run, settings.jobs) as jobs:
        [row] = until(lambda: [row for row in jobs.rows() if row.status == "finished"])
    assert (row.kind, row.tries, row.result) == (
        "verify",
        1,
        {"moved": True, "number": 1, "reward": 1.0},
    )


def test_a_job_takes_the_users_scorer_and_nothing_else_from_the_users_directory(
    site: Site, tmp_path: Path
) -> None:
    # given: a jobs worker that was started in a directory with files named like ours
    home = tmp_path / "home"
    write_own_modules(home)
    settings = site.settings().model_copy(update={"task": TaskSettings(scorer=SCORER)})
    text = settings.model_dump_json().replace("**********", site.url)
    worker = subprocess.Popen(
        [sys.executable, "-P", "-c", RUN_JOBS, site.url, text],
        cwd=home,
        env=installed_environment(tmp_path / "installed"),
    )
    site.processes.append(worker)
    # when
    site.verifier("first", site.settings())  # it hands all to jobs, and never calls its scorer
    site.put(1)
    # then
    assert site.scored(1)[1].reward == REWARD


def test_slow_ones_go_to_jobs_by_mark_or_by_the_clock_and_quick_ones_stay(site: Site) -> None:
    settings = site.settings("slow")
    site.jobs_worker(settings)
    site.verifier("first", settings)
    site.put(1)
    site.put(2, slow=True)
    site.put(3, do="take_a_while")
    done = site.scored(3)
    assert {number: rollout.reward for number, rollout in done.items()} == {1: 1.0, 2: 1.0, 3: 1.0}
    by_job = {
        number for number, rollout in done.items() if rollout.timings[0].worker.startswith("job-")
    }
    assert by_job == {2, 3}


def test_a_job_keeps_to_the_time_limit_of_verification(site: Site) -> None:
    settings = site.settings(timeout=0.3)
    site.jobs_worker(settings)
    site.verifier("first", settings)
    site.put(1, do="ignore_signals")
    done = site.scored(1)[1]
    assert (done.reward, done.reward_parts) == (0.0, {"timed_out": 1.0})


def test_the_lease_is_kept_while_the_job_is_under_way(site: Site) -> None:
    settings = site.settings()
    site.jobs_worker(settings)
    site.verifier("first", settings)
    site.put_slow(1)
    until(site.begun.exists)
    site.verifier("second", settings)
    until(lambda: len(site.bus.state.workers()) == 3)
    time.sleep(2 * LEASE_S)  # the second would have claimed it by now
    [row] = site.bus.streams.all_pending_rows("verify")
    assert (row.consumer, row.deliveries) == ("first", 1)
    site.go_on.touch()
    assert site.scored(1)[1].reward == 1.0


def test_the_work_of_a_killed_work_horse_is_done_by_the_next_try(site: Site) -> None:
    settings = site.settings()
    worker = site.jobs_worker(settings)
    site.verifier("first", settings)
    site.put_slow(1)
    until(site.begun.exists)
    site.begun.unlink()
    os.kill(min(descendants(worker.pid)), signal.SIGKILL)  # the first that it started
    until(site.begun.exists)
    site.go_on.touch()
    assert site.scored(1)[1].reward == 1.0
    assert site.bus.state.dead_count() == 0


def test_a_verifier_that_is_killed_meanwhile_costs_nothing(site: Site) -> None:
    settings = site.settings()
    site.jobs_worker(settings)
    first = site.verifier("first", settings)
    site.put_slow(1)
    until(site.begun.exists)
    first.kill()
    first.join()
    site.verifier("second", settings)
    until(
        lambda: [row.consumer for row in site.bus.streams.all_pending_rows("verify")] == ["second"]
    )
    site.go_on.touch()
    assert site.scored(1)[1].reward == 1.0
    with JobQueue(site.url, site.bus.run, settings.jobs) as jobs:
        assert [row.tries for row in jobs.rows()] == [1]
    assert (site.bus.state.numbers("score"), site.bus.state.dead_count()) == ([1], 0)


def test_what_fails_as_a_job_for_good_is_a_dead_letter(site: Site) -> None:
    settings = site.settings(retries=0)
    worker = site.jobs_worker(settings)
    site.verifier("first", settings)
    site.put_slow(1)
    until(site.begun.exists)
    os.kill(min(descendants(worker.pid)), signal.SIGKILL)
    [letter] = until(site.bus.state.dead_letters)
    assert (letter.number, letter.stage) == (1, "verify")
    assert (
        letter.reason.startswith("its verification failed as a job: ")
        and "signal 9" in letter.reason
    )
    tombstone = decode_work(site.bus.streams.read("train", 1)[0].payload)
    assert isinstance(tombstone, Tombstone) and tombstone.number == 1


def test_a_job_that_comes_late_finds_the_entry_gone(site: Site) -> None:
    site.put(1)
    [entry] = site.bus.streams.read("verify", 1)
    settings = site.settings()
    assert verify_entry(settings, site.bus, entry.id.decode()) == {
        "moved": True,
        "number": 1,
        "reward": 1.0,
    }
    assert verify_entry(settings, site.bus, entry.id.decode()) == {"moved": False}
    assert site.bus.state.numbers("score") == [1]


def test_a_verifier_says_when_no_jobs_worker_takes_what_it_has(site: Site) -> None:
    site.verifier("first", site.settings())
    site.put(1)
    [state] = until(lambda: [state for state in site.bus.state.workers() if state.detail])
    assert state.detail == "1 verifications wait for a jobs worker (onstream worker jobs)"
