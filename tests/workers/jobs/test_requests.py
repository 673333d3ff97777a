"""What a person is told who asks for a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.settings.root import Settings
from onstream.workers.jobs.requests import ask_evaluation, ask_prune


@pytest.fixture
def settings(bus: Bus, redis_url: str, tmp_path: Path) -> Settings:
    given = {
        "run": {"name": bus.run, "dir": str(tmp_path)},
        "model": {"name": str(tmp_path)},
        "redis": {"url": redis_url},
    }
    made = Settings.model_validate(given)
    made.run_dir.mkdir()
    return made


def test_who_asks_for_a_job_where_nobody_does_jobs_is_told_what_does_it(settings: Settings) -> None:
    assert ask_evaluation(settings, 0) == (
        "asked for the evaluation of version 0, but no jobs worker is at work: it waits for one; "
        f"`onstream eval {settings.run_dir} --version 0` does it here and now"
    )


def test_a_run_at_work_may_be_given_a_jobs_worker(settings: Settings, bus: Bus) -> None:
    bus.state.write_heartbeat("train", Stats())
    assert f"`onstream worker jobs {settings.run_dir}` starts one" in ask_prune(settings)


def test_with_a_jobs_worker_the_list_of_jobs_is_named(settings: Settings, bus: Bus) -> None:
    bus.state.write_heartbeat("jobs", Stats())
    asked = f"asked for pruning; `onstream jobs {settings.run_dir}` shows how it goes"
    assert ask_prune(settings) == asked
