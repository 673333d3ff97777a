"""`deployment.scale`: what others start beside this process decides the route, and is not started
here.
"""

from __future__ import annotations

from onstream.settings.load import load_settings, resolve
from onstream.settings.plan import make_plan
from onstream.settings.rules import warnings_of

TAUGHT = ["teacher_inference.model.name=big", "trainer.loss.teacher_tau=1"]
ENDPOINT = [
    "orchestrator.teacher_model.client.base_url=http://a/v1",
    "orchestrator.teacher_model.model.name=other",
]
COMPOSED = [
    f"deployment.scale.{kind}=1"
    for kind in ("generator", "verifier", "teacher", "teacher_external", "jobs")
]


def test_only_the_trainer_is_started_where_others_start_the_rest() -> None:
    settings = load_settings(overrides=[*TAUGHT, *COMPOSED, "eval.interval=10"], environ={})
    plan = make_plan(settings)
    assert plan.workers == {"generator": 0, "verifier": 0, "teacher": 0, "trainer": 1, "jobs": 0}
    assert plan.route == ("verify", "score", "train")
    assert warnings_of(settings) == []


def test_a_scale_of_one_asks_for_no_teacher_that_is_configured_nowhere() -> None:
    assert make_plan(load_settings(overrides=COMPOSED, environ={})).route == ("verify", "train")


def test_no_verifier_is_no_verification() -> None:
    settings = load_settings(
        overrides=[*TAUGHT, "deployment.scale.verifier=0", "trainer.loss.adv_tau=0"], environ={}
    )
    assert make_plan(settings).route == ("score", "train")


def test_verification_that_is_asked_for_explicitly_waits_for_a_verifier() -> None:
    overrides = ["deployment.scale.verifier=0", "orchestrator.verification.enabled=true"]
    settings = load_settings(overrides=overrides, environ={})
    assert make_plan(settings).route == ("verify", "train")
    assert any("No verifier worker is started here" in warning for warning in warnings_of(settings))


def test_an_external_teacher_takes_the_place_of_a_local_one_that_is_scaled_to_zero_under_a_name_of_its_own() -> (
    None
):
    settings = load_settings(
        overrides=[*TAUGHT, *ENDPOINT, *COMPOSED, "deployment.scale.teacher=0"], environ={}
    )
    plan = make_plan(settings)
    assert (plan.teacher, plan.external_teacher) == (None, "other")
    assert plan.kinds("score") == ["teacher-external"]
    assert plan.run_settings["teacher_inference.model.name"] == "other"


def test_a_teacher_that_the_loss_needs_and_nobody_starts_is_a_problem() -> None:
    (problem,) = resolve(overrides=[*TAUGHT, "deployment.scale.teacher=0"], environ={}).problems
    assert "deployment.scale.teacher = 0" in str(problem)
    assert "Set deployment.scale.teacher = 1, or orchestrator.teacher_model" in str(problem)


def test_a_teacher_that_others_start_needs_no_server_here() -> None:
    overrides = [*TAUGHT, "teacher_inference.engine=vllm", "deployment.scale.teacher=2"]
    assert make_plan(load_settings(overrides=overrides, environ={})).teacher_server == 0
