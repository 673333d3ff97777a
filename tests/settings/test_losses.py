"""`trainer.loss` by its type: which settings each has, what it says it needs, and old runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onstream.settings.fields import known
from onstream.settings.load import load_settings, resolve
from onstream.settings.plan import Plan, differences, make_plan
from onstream.settings.rules import warnings_of
from onstream.settings.sections.losses import CustomLoss, Loss, RlLoss, SftLoss
from onstream.settings.sections.trainer import TrainerSettings
from onstream.settings.toml import toml_text

HARD = [
    "orchestrator.use_token_client=false",
    "orchestrator.teacher_rollout_model.client.base_url=http://a/v1",
    "orchestrator.teacher_rollout_model.model.name=big",
]
SFT = ["trainer.loss.type=sft", *HARD]
CUSTOM = ["trainer.loss.type=custom", "trainer.loss.function=mine:loss"]
TEACHER = ["deployment.num_teacher_gpus=1", "teacher_inference.model.name=big"]


def loss_of(*overrides: str, **environ: str) -> Loss:
    return load_settings(overrides=overrides, environ=environ).trainer.loss


def problems(*overrides: str, **environ: str) -> list[str]:
    return [str(found) for found in resolve(overrides=overrides, environ=environ).problems]


def needs(*names: str) -> str:
    return f"trainer.loss.needs=[{', '.join(f'{name!r}' for name in names)}]".replace("'", '"')


def test_a_loss_without_a_type_is_rl() -> None:
    assert loss_of("trainer.loss.kl_tau=0.5") == RlLoss(kl_tau=0.5)
    assert TrainerSettings.model_validate({"loss": {}}).loss == RlLoss()


@pytest.mark.parametrize(
    "source",
    ["file", "environment", "overrides", "a table as JSON"],
)
def test_every_source_chooses_the_type_and_sets_its_fields(source: str, tmp_path: Path) -> None:
    file = tmp_path / "custom.toml"
    overrides: list[str] = []
    environ: dict[str, str] = {}
    if source == "file":
        file.write_text(
            '[trainer.loss]\ntype = "custom"\nfunction = "mine:loss"\nneeds = ["reward"]\n'
            'args = {beta = 0.5, words = ["a"]}\n'
        )
    elif source == "environment":
        environ = {
            "ONSTREAM_TRAINER__LOSS__TYPE": "custom",
            "ONSTREAM_TRAINER__LOSS__FUNCTION": "mine:loss",
            "ONSTREAM_TRAINER__LOSS__NEEDS": '["reward"]',
            "ONSTREAM_TRAINER__LOSS__ARGS__BETA": "0.5",
            "ONSTREAM_TRAINER__LOSS__ARGS__WORDS": '["a"]',
        }
    elif source == "overrides":
        overrides = [
            *CUSTOM,
            needs("reward"),
            "trainer.loss.args.beta=0.5",
            'trainer.loss.args.words=["a"]',
        ]
    else:
        overrides = [
            'trainer.loss={"type": "custom", "function": "mine:loss", "needs": ["reward"], '
            '"args": {"beta": 0.5, "words": ["a"]}}'
        ]
    files = [file] if source == "file" else []
    assert load_settings(files, overrides, environ).trainer.loss == CustomLoss(
        function="mine:loss", needs=("reward",), args={"beta": 0.5, "words": ["a"]}
    )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            [*SFT, "trainer.loss.teacher_tau=0.5"],
            'trainer.loss.type = "sft" with trainer.loss.teacher_tau = 0.5; expected '
            'trainer.loss.teacher_tau only where trainer.loss.type is "rl". '
            "Leave trainer.loss.teacher_tau out, or set trainer.loss.type.",
        ),
        (
            [*SFT, "trainer.loss.teacher_top_k=4"],
            'trainer.loss.type = "sft" with trainer.loss.teacher_top_k = 4; expected '
            'trainer.loss.teacher_top_k only where trainer.loss.type is "rl" or "custom". '
            "Leave trainer.loss.teacher_top_k out, or set trainer.loss.type.",
        ),
        (
            ["trainer.loss.function=mine:loss"],
            'trainer.loss.type = "rl" with trainer.loss.function = mine:loss; expected '
            'trainer.loss.function only where trainer.loss.type is "custom". '
            "Leave trainer.loss.function out, or set trainer.loss.type.",
        ),
        (
            ["trainer.loss.type=custom"],
            'trainer.loss.type = "custom" without trainer.loss.function; expected text. '
            "Set trainer.loss.function: The loss, as `module:function`: a function of "
            "`LossInputs` that returns one loss a token.",
        ),
        (
            ["trainer.loss=5"],
            "trainer.loss = 5; expected a table. [trainer.loss] is a table of settings.",
        ),
    ],
)
def test_what_no_loss_of_the_type_has_is_told_with_the_type_that_has_it(
    overrides: list[str], told: str
) -> None:
    assert problems(*overrides) == [told]


def test_a_function_that_is_wrong_is_not_told_to_be_missing_as_well() -> None:
    [told] = problems("trainer.loss.type=custom", "trainer.loss.function=mine", needs("reward"))
    assert told.startswith("trainer.loss.function = mine; expected text to match pattern")


def test_an_automatic_top_k_asks_for_8_and_needs_one_where_the_sampled_token_does_not_do() -> None:
    auto = RlLoss(teacher_tau=1)
    assert (auto.teacher_top_k, auto.most_top_k, auto.lowers_variance) == ("auto", 8, True)
    assert [auto.least_top_k(scaled=scaled) for scaled in (False, True)] == [0, 1]
    assert RlLoss(teacher_tau=1, teacher_divergence="jsd").least_top_k(scaled=False) == 1
    for k in (0, 4):
        given = RlLoss(teacher_tau=1, teacher_top_k=k)
        assert (given.most_top_k, given.lowers_variance) == (k, False)
        assert [given.least_top_k(scaled=scaled) for scaled in (False, True)] == [k, k]
    needs = ("teacher_logprobs",)
    for other in (RlLoss(), SftLoss(), CustomLoss(function="mine:loss", needs=needs)):
        assert (other.most_top_k, other.needs_top_k, other.lowers_variance) == (0, False, False)
        assert other.least_top_k(scaled=True) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2000", "'auto' or less than or equal to 1024"),
        ("four", "'auto' or a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_wrong_top_k_is_told_once_with_both_of_what_it_may_be(value: str, expected: str) -> None:
    [told] = problems(f"trainer.loss.teacher_top_k={value}")
    assert told.startswith(f"trainer.loss.teacher_top_k = {value}; expected {expected}. It is:")


def test_each_loss_says_what_it_needs() -> None:
    def asked(loss: Loss) -> dict[str, Any]:
        return {
            "generator": loss.reads_generator,
            "teacher": loss.needs_teacher,
            "top": loss.needs_top_k,
            "reward": loss.needs_reward,
            "unit": loss.unit,
            "unscored": loss.trains_unscored,
        }

    assert asked(RlLoss()) == {
        "generator": True,
        "teacher": False,
        "top": False,
        "reward": True,
        "unit": "group",
        "unscored": False,
    }
    assert asked(RlLoss(teacher_tau=1, adv_tau=0, teacher_top_k=4)) == {
        "generator": True,
        "teacher": True,
        "top": True,
        "reward": False,
        "unit": "rollout",
        "unscored": True,
    }
    nothing = {
        "generator": False,
        "teacher": False,
        "top": False,
        "reward": False,
        "unit": "rollout",
        "unscored": True,
    }
    assert asked(SftLoss()) == nothing
    assert asked(CustomLoss(function="mine:loss", teacher_top_k=4)) == nothing
    every = ("generator_logprobs", "teacher_logprobs", "reward")
    assert asked(CustomLoss(function="mine:loss", needs=every, teacher_top_k=4)) == {
        "generator": True,
        "teacher": True,
        "top": True,
        "reward": True,
        "unit": "group",
        "unscored": True,
    }


@pytest.mark.parametrize(
    ("overrides", "route"),
    [
        ([*CUSTOM, needs("reward")], ("verify", "train")),
        (
            [*CUSTOM, needs("teacher_logprobs"), *TEACHER],
            ("verify", "score", "train"),
        ),
        (
            [
                *CUSTOM,
                needs("teacher_logprobs"),
                *TEACHER,
                "orchestrator.verification.enabled=false",
            ],
            ("score", "train"),
        ),
        ([*CUSTOM, *HARD], ("verify", "train")),
    ],
)
def test_a_custom_loss_brings_the_stages_that_it_needs(
    overrides: list[str], route: tuple[str, ...]
) -> None:
    settings = load_settings(overrides=overrides, environ={})
    assert make_plan(settings).route == route
    assert warnings_of(settings) == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (CUSTOM, "a teacher whose completions are trained on"),
        ([*CUSTOM, needs("teacher_logprobs")], "trainer.loss.needs = "),
        ([*CUSTOM, needs("reward"), "orchestrator.group_size=1"], "at least 2 rollouts a group"),
        (
            [*CUSTOM, needs("reward"), "orchestrator.verification.enabled=false"],
            'Take "reward" out of trainer.loss.needs, or enable verification.',
        ),
        (
            [*CUSTOM, needs("generator_logprobs"), *HARD],
            "what the teacher wrote has no importance ratios",
        ),
        ([*CUSTOM, needs("reward"), *TEACHER], "custom reads none of it"),
        (
            [*CUSTOM, needs("generator_logprobs", "reward"), "trainer.lora.dropout=0.1"],
            "no dropout with custom",
        ),
    ],
)
def test_a_custom_loss_that_cannot_get_what_it_needs_is_refused(
    overrides: list[str], told: str
) -> None:
    assert sum(told in line for line in problems(*overrides)) == 1


def test_the_plan_and_the_runs_file_hold_the_settings_of_the_chosen_type_alone() -> None:
    settings = load_settings(overrides=SFT, environ={})
    assert [name for name in make_plan(settings).run_settings if "trainer.loss" in name] == [
        "trainer.loss.type"
    ]
    assert '[trainer.loss]\ntype = "sft"\n\n' in toml_text(settings)


def of_the_version_before(plan: Plan) -> Plan:
    """`plan` as that version wrote it: with all settings of `rl`, whatever the type."""
    held = {
        name: setting.default
        for name, setting in known().items()
        if "rl" in setting.types and name not in plan.run_settings
    }
    plan.run_settings.update(held)
    return plan


def test_a_run_that_the_version_before_began_is_the_same_run() -> None:
    theirs = of_the_version_before(make_plan(load_settings(overrides=SFT, environ={})))
    assert len(theirs.run_settings) > 10
    ours = make_plan(load_settings(overrides=SFT, environ={}))
    assert differences(ours, theirs) == []
    theirs.run_settings["trainer.loss.kl_tau"] = 0.5
    [found] = differences(ours, theirs)
    assert (found.name, found.theirs) == ("trainer.loss.kl_tau", 0.5)


def test_a_run_with_another_loss_differs_by_its_type_and_what_is_set() -> None:
    ours = make_plan(load_settings(overrides=SFT, environ={}))
    theirs = make_plan(load_settings(overrides=["trainer.loss.kl_tau=0.5"], environ={}))
    found = [item.name for item in differences(ours, theirs) if "trainer.loss" in item.name]
    assert found == ["trainer.loss.type", "trainer.loss.kl_tau"]


def test_the_settings_file_of_a_run_of_the_version_before_loads(tmp_path: Path) -> None:
    text = toml_text(load_settings(overrides=SFT, environ={}))
    others = 'teacher_tau = 0.0\nadv_tau = 1.0\ntrust_region = "signed"\nteacher_top_k = 0\n'
    old = text.replace('type = "sft"\n', f'type = "sft"\n{others}')
    (tmp_path / "settings.toml").write_text(old)
    assert load_settings([tmp_path], environ={}).trainer.loss == SftLoss()
    (tmp_path / "settings.toml").write_text(old.replace("adv_tau = 1.0", "adv_tau = 0.5"))
    [told] = resolve([tmp_path], environ={}).problems
    assert "trainer.loss.adv_tau = 0.5" in str(told)


def test_a_setting_of_several_types_is_the_same_in_each() -> None:
    for setting in known().values():
        if len(setting.types) > 1:
            fields = [
                variant.model_fields[setting.name.rpartition(".")[2]]
                for variant in (RlLoss, SftLoss, CustomLoss)
                if variant.model_fields["type"].default in setting.types
            ]
            assert all(repr(field) == repr(fields[0]) for field in fields)
