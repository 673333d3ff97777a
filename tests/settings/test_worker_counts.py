"""`[deployment.workers]`: how many there are decides the route, and who starts them does not."""

from __future__ import annotations

from onstream.settings.load import load_settings, resolve
from onstream.settings.plan import make_plan
from onstream.settings.rules import warnings_of
from onstream.settings.sections.deployment import count_name
from onstream.settings.stages import COUNTED

TAUGHT = ["teacher_inference.model.name=big", "trainer.loss.teacher_tau=1"]
ENDPOINT = [
    "orchestrator.teacher_model.client.base_url=http://a/v1",
    "orchestrator.teacher_model.model.name=other",
]
COMPOSED = [
    'deployment.started_elsewhere=["generator","verifier","teacher","teacher-external","jobs"]',
    *(f"deployment.workers.{count_name(worker.kind)}=1" for worker in COUNTED),
]


def test_only_the_trainer_is_started_where_others_start_the_rest() -> None:
    settings = load_settings(overrides=[*TAUGHT, *COMPOSED, "eval.interval=10"], environ={})
    plan = make_plan(settings)
    assert plan.workers == {"generator": 0, "verifier": 0, "teacher": 0, "trainer": 1, "jobs": 0}
    assert plan.route == ("verify", "score", "train")
    assert warnings_of(settings) == []


def test_a_count_of_one_asks_for_no_teacher_that_is_configured_nowhere() -> None:
    assert make_plan(load_settings(overrides=COMPOSED, environ={})).route == ("verify", "train")


def test_no_verifier_is_no_verification() -> None:
    settings = load_settings(
        overrides=[*TAUGHT, "deployment.workers.verifier=0", "trainer.loss.adv_tau=0"], environ={}
    )
    assert make_plan(settings).route == ("score", "train")


def test_verification_that_is_asked_for_explicitly_waits_for_a_verifier() -> None:
    overrides = ["deployment.workers.verifier=0", "orchestrator.verification.enabled=true"]
    settings = load_settings(overrides=overrides, environ={})
    assert make_plan(settings).route == ("verify", "train")
    assert any("No verifier worker is started here" in warning for warning in warnings_of(settings))


def test_an_external_teacher_takes_the_place_of_a_local_one_that_is_left_out() -> None:
    settings = load_settings(
        overrides=[*TAUGHT, *ENDPOINT, *COMPOSED, "deployment.workers.teacher=0"], environ={}
    )
    plan = make_plan(settings)
    assert (plan.teacher, plan.external_teacher) == (None, "other")
    assert plan.kinds("score") == ["teacher-external"]
    assert plan.run_settings["teacher_inference.model.name"] == "other"


def test_a_teacher_that_the_loss_needs_and_nobody_starts_is_a_problem() -> None:
    (problem,) = resolve(overrides=[*TAUGHT, "deployment.workers.teacher=0"], environ={}).problems
    assert "deployment.workers.teacher = 0" in str(problem)
    assert "Set deployment.workers.teacher = 1, or orchestrator.teacher_model" in str(problem)


def test_a_teacher_that_others_start_needs_no_server_here() -> None:
    elsewhere = 'deployment.started_elsewhere=["teacher"]'
    overrides = [*TAUGHT, "teacher_inference.engine=vllm", elsewhere]
    assert make_plan(load_settings(overrides=overrides, environ={})).teacher_server == 0


def test_the_counts_say_how_many_workers_are_started_here() -> None:
    counts = {"generator": 3, "verifier": 2, "teacher": 4}
    overrides = [f"deployment.workers.{kind}={count}" for kind, count in counts.items()]
    plan = make_plan(load_settings(overrides=[*TAUGHT, *overrides], environ={}))
    assert plan.workers == counts | {"trainer": 1}


def test_a_kind_that_others_start_leaves_the_rest_here() -> None:
    overrides = [*TAUGHT, 'deployment.started_elsewhere=["generator"]']
    settings = load_settings(overrides=overrides, environ={})
    assert make_plan(settings).workers == {
        "generator": 0,
        "verifier": 1,
        "teacher": 1,
        "trainer": 1,
    }
    assert warnings_of(settings) == []


def test_two_numbers_of_teachers_are_a_problem() -> None:
    overrides = [*TAUGHT, "deployment.num_teacher_gpus=2", "deployment.workers.teacher=3"]
    (problem,) = resolve(overrides=overrides, environ={}).problems
    assert problem.names == ("deployment.workers.teacher", "deployment.num_teacher_gpus")
    assert "Leave deployment.workers.teacher out" in str(problem)
