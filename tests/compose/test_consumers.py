"""Which consumers run is the configuration: `.env` alone selects them, and the containers that ran
and the metrics show it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compose.conftest import MakeProject
from tests.compose.project import Project, wait_for

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TEACHER = "examples/reverse-text/teacher"
KEY = "sk-of-the-server"
SHORT = {
    "JOBS": "0",
    "ONSTREAM_TRAINER__MAX_STEPS": "4",
    "ONSTREAM_ORCHESTRATOR__BATCH_SIZE": "32",
    "ONSTREAM_EVAL__SAMPLES": "8",
}
SCORES = "ONSTREAM_ORCHESTRATOR__TEACHER_MODEL__"
EXTERNAL = {
    "COMPOSE_PROFILES": "teacher-external",
    f"{SCORES}CLIENT__BASE_URL": "http://teacher-server:8000/v1",
    f"{SCORES}MODEL__NAME": TEACHER,
    f"{SCORES}CLIENT__API_KEY": KEY,
}
WRITES = "ONSTREAM_ORCHESTRATOR__TEACHER_ROLLOUT_MODEL__"
ALWAYS = {"prepare", "redis", "trainer", "generator"}


@pytest.fixture
def with_server(project: MakeProject):  # type: ignore[no-untyped-def]
    """Makes projects in whose network a server of the teacher answers; it is no part of what `up`
    waits for.
    """

    def make(**variables: str) -> Project:
        made = project(
            HERE / "teacher-server.yaml",
            KEY=KEY,
            SERVER=str(HERE / "teacher_server.py"),
            **SHORT,
            **variables,
        )
        made.compose("up", "-d", "--no-deps", "teacher-server")
        wait_for(
            lambda: "serving" in made.compose("logs", "--no-color", "teacher-server"),
            "the teacher's server",
            120,
        )
        return made

    return make


def run_through(made: Project, *services: str) -> list[dict]:  # type: ignore[type-arg]
    """The metrics of the run. `services` are named where the server must not keep `up` from
    returning.
    """
    made.run_through(*services)
    rows = made.rows("metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    ended = {
        one["Config"]["Labels"]["com.docker.compose.service"]: one["State"]["ExitCode"]
        for one in made.containers()
    }
    ended.pop("teacher-server", None)
    assert set(ended.values()) == {0}, ended
    return rows


def test_without_a_verifier_it_is_pure_distillation(project: MakeProject) -> None:
    made = project(VERIFIERS="0", **SHORT)
    rows = run_through(made)
    assert made.services() == {*ALWAYS, "teacher"}
    assert all(row["reward"] is None and row["teacher_kl"] > 0 for row in rows)
    assert {tuple(row["scored_by"]) for row in rows} == {(TEACHER,)}


def test_an_external_teacher_in_another_container_takes_the_place_of_the_local_one(
    with_server,
) -> None:  # type: ignore[no-untyped-def]
    made = with_server(TEACHERS="0", **EXTERNAL)
    rows = run_through(made, "trainer", "generator", "verifier", "teacher-external")
    assert made.services() == {*ALWAYS, "verifier", "teacher-external", "teacher-server"}
    assert all(row["reward"] is not None and row["teacher_kl"] > 0 for row in rows)
    scorers = {name for row in rows for name in row["scored_by"]}
    assert scorers and TEACHER not in scorers, scorers
    told = {
        one["Config"]["Labels"]["com.docker.compose.service"]
        for one in made.containers()
        if KEY in str(one)
    }
    assert told == {"teacher-external", "teacher-server"}


def test_both_teachers_share_one_stream(with_server) -> None:  # type: ignore[no-untyped-def]
    made = with_server(**EXTERNAL, ONSTREAM_TEACHER_INFERENCE__MAX_BATCH_TOKENS="256")
    rows = run_through(made, "trainer", "generator", "verifier", "teacher", "teacher-external")
    assert made.services() == {*ALWAYS, "verifier", "teacher", "teacher-external", "teacher-server"}
    scorers = {name for row in rows for name, share in row["scored_by"].items() if share}
    assert TEACHER in scorers and len(scorers) == 2, scorers


def test_hard_distillation_runs_no_scoring_teacher_though_none_was_scaled_to_zero(
    with_server,
) -> None:  # type: ignore[no-untyped-def]
    made = with_server(
        SETTINGS="examples/hard.toml",
        **{
            f"{WRITES}CLIENT__BASE_URL": "http://teacher-server:8000/v1",
            f"{WRITES}MODEL__NAME": TEACHER,
            f"{WRITES}CLIENT__API_KEY": KEY,
        },
    )
    plain = (made.directory / "examples/reverse-text/onstream.toml").read_text()
    hard = plain.partition("[trainer.loss]")[0].replace(
        '[teacher_inference.model]\nname = "examples/reverse-text/teacher"\n', ""
    )
    (made.directory / "examples/hard.toml").write_text(
        hard.replace("[orchestrator]\n", "[orchestrator]\nuse_token_client = false\n")
        + '[trainer.loss]\ntype = "sft"\n'
    )
    rows = run_through(made, "trainer", "generator", "verifier", "teacher")
    assert all(row["teacher_kl"] is None and row["reward"] is not None for row in rows)
    assert "this run needs no such worker" in made.said()
