"""Evaluations during a run: requested by the trainer, done by a jobs worker, read as metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.redis.job_queue import JobQueue
from onstream.pipeline.weights.directory_store import pin, pinned, pins, unpin
from onstream.settings.sections.jobs import JobsSettings
from onstream.workers.launcher.report import build
from tests.workers.trainer.driver import Run

RunMaker = Callable[..., Run]


@pytest.fixture
def start(run: RunMaker, redis_url: str) -> Callable[..., Run]:
    def begin(**changes: Any) -> Run:
        started = run(
            **{"eval__interval": 2, "eval__samples": 4, "redis__url": redis_url, **changes}
        )
        started.ready()
        return started

    return begin


@pytest.fixture
def jobs(redis_url: str, run_name: str) -> Iterator[JobQueue]:
    with JobQueue(redis_url, run_name, JobsSettings()) as jobs:
        yield jobs


def asked(jobs: JobQueue) -> list[str]:
    return sorted(row.key for row in jobs.rows())


def policies(run: Run) -> set[int]:
    return {int(path.name) for path in (run.trainer.directory.path / "policies").glob("[0-9]*")}


def test_every_interval_a_version_is_asked_for_and_kept_until_it_is_evaluated(
    start: Callable[..., Run], jobs: JobQueue
) -> None:
    started = start(checkpoint__keep_policies=2, trainer__max_steps=8)
    started.to_the_end()
    assert asked(jobs) == ["2", "4", "6", "8"]
    assert pinned(started.trainer.directory.path) == {2, 4, 6, 8}
    assert {0, 2, 4, 6, 7, 8} == policies(started)


def test_a_replayed_step_is_not_asked_for_twice(start: Callable[..., Run], jobs: JobQueue) -> None:
    started = start()
    started.until(3)
    started.start()
    started.to_the_end()
    assert asked(jobs) == ["2", "4", "6"]


def test_what_redis_forgot_is_asked_for_again_by_the_next_trainer(
    start: Callable[..., Run], jobs: JobQueue
) -> None:
    started = start()
    started.until(4)
    started.turn()
    for job in jobs.queue.jobs:
        job.delete()
    assert asked(jobs) == []
    started.start()
    assert asked(jobs) == ["2", "4"]


def test_no_more_evaluations_than_may_wait_are_asked_for_but_for_the_last(
    start: Callable[..., Run], jobs: JobQueue
) -> None:
    started = start(jobs__max_waiting=1)
    started.to_the_end()
    assert asked(jobs) == ["2", "6"]
    assert pinned(started.trainer.directory.path) == {2, 6}


def test_a_job_that_cannot_be_asked_for_costs_no_step(
    start: Callable[..., Run], jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redis.exceptions import OutOfMemoryError

    def full(*_: object, **__: object) -> bool:
        raise OutOfMemoryError("full")

    started = start()
    monkeypatch.setattr(JobQueue, "ask", full)
    started.to_the_end()
    assert pinned(started.trainer.directory.path) == set()


def test_results_join_the_metrics_of_the_next_step_and_the_report(
    start: Callable[..., Run],
) -> None:
    started = start()
    started.until(2)
    with (started.trainer.directory.path / "evals.jsonl").open("a") as file:
        file.write(
            '{"version": 0, "exact": 0.25, "reward": 0.5, "samples": 4}\n'
            '{"version": 2, "exact": 0.5, "reward": 0.6, "samples": 4}\n'
        )
        file.write('{"version": 4, "exa')
    started.to_the_end()
    rows = started.rows()
    assert [
        (row["eval_version"], row["eval_exact"], row["eval_reward"])
        for row in rows
        if row["eval_version"] is not None
    ] == [(2, 0.5, 0.6)]
    assert rows[1]["eval_version"] is None
    report = build(started.trainer.directory.path)
    assert report["evals"] == [{"version": 0, "exact": 0.25}, {"version": 2, "exact": 0.5}]


def test_without_an_interval_nothing_is_asked_for_and_the_metrics_are_as_ever(
    start: Callable[..., Run], jobs: JobQueue
) -> None:
    started = start(eval__interval=0)
    started.to_the_end()
    assert asked(jobs) == []
    assert "eval_version" not in started.rows()[0]


def test_a_jobs_worker_evaluates_what_was_asked_for_and_lets_go_of_it(
    start: Callable[..., Run], jobs: JobQueue, redis_url: str
) -> None:
    started = start(eval__interval=3, inference__sampling__max_completion=4)
    started.to_the_end()
    settings = started.settings().model_dump(mode="json") | {"redis": {"url": redis_url}}
    command = [
        sys.executable,
        "-m",
        "tests.workers.jobs.worker_process",
        redis_url,
        json.dumps(settings),
    ]
    subprocess.run(command, check=True)
    assert {
        row.key: (row.status, row.result["version"])
        for row in jobs.rows()
        if row.kind == "evaluate"
    } == {
        "3": ("finished", 3),
        "6": ("finished", 6),
    }
    lines = (started.trainer.directory.path / "evals.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [3, 6]
    assert pinned(started.trainer.directory.path) == set()


def test_a_version_is_kept_as_long_as_anybody_needs_it(tmp_path: Path) -> None:
    assert pin(tmp_path, 4, "a")
    assert not pin(tmp_path, 4, "a")
    assert pin(tmp_path, 4, "b")
    unpin(tmp_path, 4, "a")
    unpin(tmp_path, 4, "a")
    assert pins(tmp_path) == {(4, "b")}
    unpin(tmp_path, 4, "b")
    assert pinned(tmp_path) == set()
