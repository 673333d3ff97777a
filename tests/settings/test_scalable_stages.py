"""Which stages `deployment.balance = "auto"` may give more workers."""

from __future__ import annotations

import pytest

from onstream.settings.load import load_settings
from onstream.settings.plan import make_plan
from onstream.settings.scalable_stages import scalable_stages, workers_with_room
from tests.settings.test_rules import ENDPOINT, HARD, TEACHER

AUTO = "deployment.balance=auto"
CPU = "deployment.device=cpu"
ALL = {"generate": "generator", "verify": "verifier", "score": "teacher"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*TEACHER, CPU, AUTO], ALL),
        ([*TEACHER, CPU], {}),
        # A GPU has no room for another model.
        ([*TEACHER, "deployment.device=cuda", AUTO], {"verify": "verifier"}),
        ([CPU, AUTO, "inference.engine=vllm"], {"verify": "verifier"}),
        (
            [*TEACHER, CPU, AUTO, 'deployment.started_elsewhere=["teacher","generator"]'],
            {"verify": "verifier"},
        ),
        ([CPU, AUTO, 'deployment.started_elsewhere=["trainer"]'], {}),
        (
            [*ENDPOINT, "trainer.loss.teacher_tau=1", CPU, AUTO],
            ALL | {"score": "teacher-external"},
        ),
        # Two workers would ask twice of what the endpoint may be asked.
        (
            [
                *ENDPOINT,
                "trainer.loss.teacher_tau=1",
                "orchestrator.teacher_model.client.requests_per_second=4",
                CPU,
                AUTO,
            ],
            {"generate": "generator", "verify": "verifier"},
        ),
        ([*HARD, "deployment.device=cuda", AUTO], {"generate": "generator", "verify": "verifier"}),
        ([CPU, AUTO, "orchestrator.verification.in_jobs=always"], {"generate": "generator"}),
    ],
)
def test_stages_with_room_and_without_a_bound_of_their_own_may_have_more_workers(
    overrides: list[str], expected: dict[str, str]
) -> None:
    settings = load_settings(overrides=overrides, environ={})
    assert scalable_stages(settings, make_plan(settings)) == expected


def test_cores_are_shared_out_so_that_one_more_that_computes_has_its_threads() -> None:
    settings = load_settings(overrides=[*TEACHER, CPU, AUTO], environ={})
    workers = workers_with_room(settings, make_plan(settings))
    assert workers == {"generator": 2, "verifier": 1, "teacher": 2, "trainer": 1}
    fixed = load_settings(overrides=[*TEACHER, CPU], environ={})
    assert workers_with_room(fixed, make_plan(fixed)) == make_plan(fixed).workers
