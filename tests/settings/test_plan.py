"""What follows from the settings: routes, workers, and which plans agree."""

from __future__ import annotations

import msgspec
import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.load import load_settings
from onstream.settings.plan import Plan, differences, make_plan, refuse_differences

STAGES = 'deployment.stages=["generate", "train"{}]'
ENDPOINT = (
    "orchestrator.teacher_model.client.base_url=http://a/v1",
    "orchestrator.teacher_model.model.name=big",
)
PURE_DISTILLATION = (
    "orchestrator.verification.enabled=false",
    "trainer.loss.adv_tau=0",
    "trainer.loss.teacher_tau=1",
    "teacher_inference.model.name=big",
)
HARD = (
    "trainer.loss.type=sft",
    "orchestrator.use_token_client=false",
    "orchestrator.teacher_rollout_model.client.base_url=http://a/v1",
    "orchestrator.teacher_rollout_model.model.name=big",
)


def plan(*overrides: str) -> Plan:
    return make_plan(load_settings(overrides=overrides, environ={}))


@pytest.mark.parametrize(
    ("overrides", "route", "teacher"),
    [
        ([], ("verify", "train"), None),
        (
            ["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1"],
            ("verify", "score", "train"),
            "Qwen/Qwen3-0.6B",
        ),
        (
            ["teacher_inference.model.name=big", "trainer.loss.teacher_tau=1"],
            ("verify", "score", "train"),
            "big",
        ),
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
        (
            [
                "teacher_inference.model.name=big",
                "trainer.loss.teacher_tau=1",
                STAGES.format(', "score"'),
            ],
            ("score", "train"),
            "big",
        ),
        (
            ["teacher_inference.model.name=big", STAGES.format(', "verify"')],
            ("verify", "train"),
            None,
        ),
        ([STAGES.format(', "verify", "score"')], ("verify", "score", "train"), "Qwen/Qwen3-0.6B"),
        (
            [
                "trainer.loss.teacher_tau=1",
                "teacher_inference.model.name=big",
                STAGES.format(', "verify"'),
            ],
            ("verify", "score", "train"),
            "big",
        ),
        (
            [
                "orchestrator.verification.enabled=true",
                "teacher_inference.model.name=big",
                "trainer.loss.teacher_tau=1",
                STAGES.format(""),
            ],
            ("verify", "score", "train"),
            "big",
        ),
    ],
)
def test_the_route_follows_from_settings_and_deployed_stages(
    overrides: list[str], route: tuple[str, ...], teacher: str | None
) -> None:
    made = plan(*overrides)
    assert (made.route, made.teacher) == (route, teacher)


def test_workers_are_those_of_the_route_that_this_deployment_starts() -> None:
    made = plan(
        "deployment.num_teacher_gpus=3",
        "trainer.loss.teacher_tau=1",
        "deployment.workers.generator=2",
        'deployment.stages=["generate", "train", "score"]',
    )
    assert made.workers == {"generator": 2, "teacher": 3, "trainer": 1}
    elsewhere = plan("orchestrator.verification.enabled=true", STAGES.format(""))
    assert elsewhere.workers == {"generator": 1, "verifier": 0, "trainer": 1}


@pytest.mark.parametrize(
    ("overrides", "workers"),
    [
        # Pure RL asks no teacher, pure distillation no verifier.
        ([], {"generator": 1, "verifier": 1, "trainer": 1}),
        (
            [
                "deployment.num_teacher_gpus=2",
                "trainer.loss.teacher_tau=1",
                "trainer.loss.adv_tau=0",
                "orchestrator.verification.enabled=false",
            ],
            {"generator": 1, "teacher": 2, "trainer": 1},
        ),
        # Endpoints instead of a teacher beside the run, or as well.
        (
            [*ENDPOINT, "trainer.loss.teacher_tau=1"],
            {"generator": 1, "verifier": 1, "teacher-external": 1, "trainer": 1},
        ),
        (
            [
                *ENDPOINT,
                "trainer.loss.teacher_tau=1",
                "teacher_inference.model.name=big",
                "deployment.workers.teacher_external=3",
            ],
            {"generator": 1, "verifier": 1, "teacher": 1, "teacher-external": 3, "trainer": 1},
        ),
        # Hard distillation: no scores, verified unless told otherwise.
        (HARD, {"generator": 1, "verifier": 1, "trainer": 1}),
        (
            [*HARD, "orchestrator.verification.enabled=false", "deployment.workers.generator=2"],
            {"generator": 2, "trainer": 1},
        ),
        ([*HARD, STAGES.format(', "score"')], {"generator": 1, "trainer": 1}),
    ],
)
def test_each_mode_starts_the_workers_it_needs(
    overrides: list[str], workers: dict[str, int]
) -> None:
    assert plan(*overrides).workers == workers


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        ([], None),
        (["eval.interval=2"], 1),
        (["orchestrator.verification.in_jobs=slow"], 1),
        (["orchestrator.verification.in_jobs=slow", "deployment.workers.jobs=3"], 3),
        (
            [
                "orchestrator.verification.in_jobs=slow",
                'deployment.started_elsewhere=["verifier"]',
            ],
            0,
        ),
        (["orchestrator.verification.in_jobs=always", *PURE_DISTILLATION], None),
    ],
)
def test_jobs_workers_are_started_beside_those_who_ask_for_jobs(
    overrides: list[str], jobs: int | None
) -> None:
    assert plan(*overrides).workers.get("jobs") == jobs


def test_a_plan_names_each_teacher_by_where_it_works() -> None:
    both = plan(*ENDPOINT, "trainer.loss.teacher_tau=1", "teacher_inference.model.name=big")
    assert (both.teacher, both.external_teacher, both.rollout_teacher) == ("big", "big", None)
    assert both.kinds("score") == ["teacher", "teacher-external"]
    hard = plan(*HARD)
    assert (hard.teacher, hard.external_teacher, hard.rollout_teacher) == (None, None, "big")


@pytest.mark.parametrize(
    "ours",
    [
        ENDPOINT,
        ("teacher_inference.model.name=big", *ENDPOINT),
        ("teacher_inference.model.name=big",),
    ],
)
def test_a_worker_may_bring_the_runs_teacher_in_a_way_of_its_own_but_no_other_teacher(
    ours: tuple[str, ...],
) -> None:
    tau = "trainer.loss.teacher_tau=1"
    run = plan(tau, "teacher_inference.model.name=big")
    refuse_differences(plan(tau, *ours), run)
    with pytest.raises(
        UserError,
        match=r'orchestrator\.teacher_model\.model\.name \(here "big", the run has "other"\)',
    ):
        refuse_differences(plan(tau, *ours), plan(tau, "teacher_inference.model.name=other"))


THINKING_OFF = 'model.chat_template_kwargs={"enable_thinking": false}'


def test_other_variables_of_the_chat_template_make_another_run() -> None:
    run = plan(THINKING_OFF)
    refuse_differences(plan(THINKING_OFF), run)
    with pytest.raises(
        UserError,
        match=r"model\.chat_template_kwargs \(here {}, the run has {enable_thinking = false}\)",
    ):
        refuse_differences(plan(), run)


def test_a_setting_that_the_plan_of_an_earlier_version_lacks_has_its_default_there() -> None:
    made = plan()
    of_before = dict(made.run_settings)
    del of_before["model.chat_template_kwargs"]
    earlier = msgspec.structs.replace(made, run_settings=of_before)
    refuse_differences(made, earlier)
    with pytest.raises(UserError, match=r"model\.chat_template_kwargs"):
        refuse_differences(plan(THINKING_OFF), earlier)


def test_a_worker_gives_the_teachers_variables_where_it_has_the_teacher() -> None:
    tau = "trainer.loss.teacher_tau=1"
    own = 'chat_template_kwargs={"thinking": true}'
    run = plan(tau, "teacher_inference.model.name=big", f"teacher_inference.model.{own}")
    refuse_differences(plan(tau, *ENDPOINT, f"orchestrator.teacher_model.model.{own}"), run)
    with pytest.raises(UserError, match=r"teacher_model\.model\.chat_template_kwargs"):
        refuse_differences(plan(tau, *ENDPOINT), run)


def test_a_plan_survives_encoding_and_other_bytes_are_refused() -> None:
    made = plan('task.args={"min_length": 4}', "trainer.optim.betas=[0.5, 0.6]")
    assert Plan.decode(made.encode()) == made
    with pytest.raises(UserError, match="does not decode") as caught:
        Plan.decode(b'{"run": 1}')
    assert caught.value.exit is Exit.REFUSED


def test_worker_settings_are_not_compared_and_changeable_ones_do_not_refuse() -> None:
    ours = plan("deployment.workers.generator=4", "trainer.max_steps=7", "log.level=debug")
    theirs = plan()
    assert [
        (item.name, item.ours, item.theirs, item.changeable) for item in differences(ours, theirs)
    ] == [("trainer.max_steps", 7, 100, True)]
    refuse_differences(ours, theirs)


def test_a_worker_with_an_automatic_rate_fits_the_number_that_the_trainer_made_of_it() -> None:
    theirs = plan("trainer.optim.lr=1e-3")
    assert differences(plan(), theirs) == []
    (other,) = differences(plan("trainer.optim.lr=1e-4"), theirs)
    assert other.name == "trainer.optim.lr"


def test_a_refusal_names_every_setting_that_differs_with_both_values() -> None:
    with pytest.raises(UserError) as caught:
        refuse_differences(
            plan("trainer.loss.kl_tau=0.5", "model.name=other", "trainer.max_steps=7"), plan()
        )
    assert caught.value.exit is Exit.REFUSED
    assert (
        'model.name (here "other", the run has "Qwen/Qwen3-0.6B"); '
        "trainer.loss.kl_tau (here 0.5, the run has 0.001)" in str(caught.value)
    )
    assert "max_steps" not in str(caught.value)


def test_a_setting_that_only_the_other_plan_knows_is_a_difference() -> None:
    theirs = plan()
    theirs.run_settings["trainer.loss.new"] = 1
    assert [(item.name, item.ours) for item in differences(plan(), theirs)] == [
        ("trainer.loss.new", None)
    ]
