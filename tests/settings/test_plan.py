"""What follows from the settings: routes, workers, and which plans agree."""

from __future__ import annotations

import pytest

from pipeline.errors import Exit, UserError
from settings.load import load_settings
from settings.plan import Plan, differences, make_plan, refuse_differences

STAGES = 'deployment.stages=["generate", "train"{}]'


def plan(*overrides: str) -> Plan:
    return make_plan(load_settings(overrides=overrides, environ={}))


@pytest.mark.parametrize(
    ("overrides", "route", "teacher"),
    [
        ([], ("verify", "train"), None),
        (["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1"], ("verify", "score", "train"), "Qwen/Qwen3-0.6B"),
        (["teacher_inference.model.name=big", "trainer.loss.teacher_tau=1"], ("verify", "score", "train"), "big"),
        (["teacher_inference.model.name=big"], ("verify", "score", "train"), "big"),
        (["deployment.num_teacher_gpus=1"], ("verify", "score", "train"), "Qwen/Qwen3-0.6B"),
        (
            [
                "teacher_inference.model.name=big",
                "trainer.loss.teacher_tau=1",
                "trainer.loss.adv_tau=0",
                "orchestrator.verification.enabled=false",
            ],
            ("score", "train"),
            "big",
        ),
        # The consumers chosen decide, unless a setting says so explicitly.
        (["teacher_inference.model.name=big", "trainer.loss.teacher_tau=1", STAGES.format(', "score"')], ("score", "train"), "big"),
        (["teacher_inference.model.name=big", STAGES.format(', "verify"')], ("verify", "train"), None),
        ([STAGES.format(', "verify", "score"')], ("verify", "score", "train"), "Qwen/Qwen3-0.6B"),
        (
            ["trainer.loss.teacher_tau=1", "teacher_inference.model.name=big", STAGES.format(', "verify"')],
            ("verify", "score", "train"),
            "big",
        ),
        (
            ["orchestrator.verification.enabled=true", "teacher_inference.model.name=big", "trainer.loss.teacher_tau=1", STAGES.format("")],
            ("verify", "score", "train"),
            "big",
        ),
    ],
)
def test_the_route_follows_from_settings_and_deployed_stages(overrides: list[str], route: tuple[str, ...], teacher: str | None) -> None:
    made = plan(*overrides)
    assert (made.route, made.teacher) == (route, teacher)


def test_workers_are_those_of_the_route_that_this_deployment_starts() -> None:
    made = plan(
        "deployment.num_teacher_gpus=3",
        "trainer.loss.teacher_tau=1",
        "deployment.generators=2",
        'deployment.stages=["generate", "train", "score"]',
    )
    assert made.workers == {"generate": 2, "score": 3, "train": 1}
    elsewhere = plan("orchestrator.verification.enabled=true", STAGES.format(""))
    assert elsewhere.workers == {"generate": 1, "verify": 0, "train": 1}


def test_a_plan_survives_encoding_and_other_bytes_are_refused() -> None:
    made = plan('task.args={"min_length": 4}', "trainer.optim.betas=[0.5, 0.6]")
    assert Plan.decode(made.encode()) == made
    with pytest.raises(UserError, match="does not decode") as caught:
        Plan.decode(b'{"run": 1}')
    assert caught.value.exit is Exit.REFUSED


def test_worker_settings_are_not_compared_and_changeable_ones_do_not_refuse() -> None:
    ours, theirs = plan("deployment.generators=4", "trainer.max_steps=7", "log.level=debug"), plan()
    assert [(item.name, item.ours, item.theirs, item.changeable) for item in differences(ours, theirs)] == [
        ("trainer.max_steps", 7, 100, True)
    ]
    refuse_differences(ours, theirs)


def test_a_refusal_names_every_setting_that_differs_with_both_values() -> None:
    with pytest.raises(UserError) as caught:
        refuse_differences(plan("trainer.loss.kl_tau=0.5", "model.name=other", "trainer.max_steps=7"), plan())
    assert caught.value.exit is Exit.REFUSED
    assert 'model.name (here "other", the run has "Qwen/Qwen3-0.6B"); trainer.loss.kl_tau (here 0.5, the run has 0.001)' in str(
        caught.value
    )
    assert "max_steps" not in str(caught.value)


def test_a_setting_that_only_the_other_plan_knows_is_a_difference() -> None:
    theirs = plan()
    theirs.run_settings["trainer.loss.new"] = 1
    assert [(item.name, item.ours) for item in differences(plan(), theirs)] == [("trainer.loss.new", None)]
