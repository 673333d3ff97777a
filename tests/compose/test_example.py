"""`docker compose up` and nothing else: the CPU example from set-up to report, and no secret where
it does not belong.
"""

from __future__ import annotations

import os

import pytest

from tests.compose.conftest import MakeProject
from tests.compose.project import Project, ran

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
API_KEY = "sk-of-the-endpoint"


@pytest.fixture(scope="module")
def finished(project: MakeProject) -> Project:
    """The example, run through, with an API key in `.env` that no service of this run needs."""
    made = project(ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__CLIENT__API_KEY=API_KEY)
    made.run_through(within_s=600)
    return made


def test_up_returns_by_itself_with_the_report_of_make_up_in_a_directory_of_the_host(
    finished: Project,
) -> None:
    report = finished.report()
    assert (report["steps"], report["rollouts"]) == (80, 80 * 128)
    assert 0.5 < report["eval"]["before"] < 0.65
    assert report["eval"]["after"] > 0.97
    assert report["teacher_kl"]["last"] < 0.3 < 1.5 < report["teacher_kl"]["first"]
    assert {"curves.png", "metrics.jsonl", "evals.jsonl", "checkpoints", "policies"} <= {
        path.name for path in finished.run_dir.iterdir()
    }
    assert "eval (exact, held out)" in finished.said()
    assert (finished.run_dir / "report.json").stat().st_uid == 1000


def test_the_services_of_the_example_ran_once_each_and_ended_well(finished: Project) -> None:
    assert finished.services() == {
        "prepare",
        "redis",
        "generator",
        "verifier",
        "teacher",
        "trainer",
        "jobs",
    }
    ended = {
        container["Name"]: (container["State"]["ExitCode"], container["RestartCount"])
        for container in finished.containers()
    }
    assert set(ended.values()) == {(0, 0)}, ended


def test_no_container_runs_as_root_but_the_one_that_prepares(finished: Project) -> None:
    users = {
        one["Config"]["Labels"]["com.docker.compose.service"]: one["Config"]["User"]
        for one in finished.containers()
    }
    assert users.pop("prepare") == "0:0"
    assert set(users.values()) == {"1000:1000"}


def test_secrets_are_in_no_log_no_plan_and_docker_tells_them_of_no_service_without_need(
    finished: Project,
) -> None:
    mount = f"{finished.name}_secrets:/secrets"
    show = [
        "docker",
        "run",
        "--rm",
        "--user",
        "0",
        "--entrypoint",
        "cat",
        "-v",
        mount,
        "onstream-test:slim",
        "/secrets/redis-password",
    ]
    password = ran(show)
    assert len(password) == 64
    told = str(finished.containers()) + finished.said() + finished.compose("logs", "--no-color")
    written = [
        path
        for path in finished.run_dir.rglob("*")
        if path.suffix in (".json", ".jsonl", ".toml", ".log")
    ]
    told += "".join(path.read_text(errors="replace") for path in written)
    assert len(written) > 8
    assert password not in told
    assert API_KEY not in told


def test_a_finished_run_is_taken_up_again_and_ends_at_once(finished: Project) -> None:
    before = (finished.run_dir / "metrics.jsonl").stat().st_mtime_ns
    finished.run_through()
    assert finished.report()["steps"] == 80
    assert (finished.run_dir / "metrics.jsonl").read_text().count("\n") == 80
    assert os.stat(finished.run_dir / "metrics.jsonl").st_mtime_ns >= before


def test_nothing_was_lost_and_nothing_trained_twice(finished: Project) -> None:
    found = finished.audit()
    assert (found["lost"], found["duplicated"], found["trained"]) == (0, 0, 80 * 128)
