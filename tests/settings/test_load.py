"""Sources, their order, and what is said of values that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.load import load_settings, resolve
from onstream.settings.problems import SettingsError
from onstream.settings.toml import toml_text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems(
    *overrides: str, environ: dict[str, str] | None = None, files: tuple[Path, ...] = ()
) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(files, overrides, environ or {})
    return str(caught.value).splitlines()


def test_defaults_alone_are_reward_only_training_of_the_named_student() -> None:
    settings = load_settings(environ={})
    assert (settings.model.name, settings.task.name, settings.orchestrator.group_size) == (
        "Qwen/Qwen3-0.6B",
        "reverse-text",
        4,
    )
    assert settings.trainer.loss.teacher_tau == 0


def test_command_line_beats_environment_beats_later_file_beats_earlier_file(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.toml",
        "[trainer]\nmax_steps = 1\nmicrobatch = 101\n[trainer.optim]\nlr = 0.1\nwarmup = 1\n",
    )
    second = write(tmp_path / "b.toml", "[trainer]\nmax_steps = 2\n[trainer.optim]\nlr = 0.2\n")
    environ = {"ONSTREAM_TRAINER__MAX_STEPS": "3", "ONSTREAM_TRAINER__OPTIM__LR": "0.3"}
    resolved = resolve([first, second], ["trainer.max_steps=4"], environ)
    assert resolved.settings is not None
    trainer = resolved.settings.trainer
    assert (trainer.max_steps, trainer.optim.lr, trainer.microbatch, trainer.optim.warmup) == (
        4,
        0.3,
        101,
        1,
    )
    assert resolved.origins["trainer.max_steps"] == "--set trainer.max_steps"
    assert resolved.origins["trainer.optim.lr"] == "ONSTREAM_TRAINER__OPTIM__LR"
    assert resolved.origins["trainer.microbatch"] == str(first)


@pytest.mark.parametrize("source", ["environment", "override"])
def test_text_sources_carry_numbers_lists_tables_truth_and_null(
    source: str, tmp_path: Path
) -> None:
    values = {
        "deployment.stages": '["generate", "train", "score"]',
        "trainer.loss.teacher_tau": "0.5",
        "trainer.optim.betas": "[0.5, 0.75]",
        "orchestrator.verification.enabled": "false",
        "trainer.loss.adv_tau": "0",
        "task.args": '{"max_length": 7}',
        "task.args.min_length": "5",
        "run.name": "123",
        "checkpoint.keep_every": "null",
    }
    file = write(tmp_path / "a.toml", "[checkpoint]\nkeep_every = 5\n")
    if source == "environment":
        settings = load_settings(
            [file],
            environ={
                "ONSTREAM_" + name.upper().replace(".", "__"): text for name, text in values.items()
            },
        )
    else:
        settings = load_settings([file], [f"{name}={text}" for name, text in values.items()], {})
    assert settings.deployment.stages == ("generate", "train", "score")
    assert settings.trainer.optim.betas == (0.5, 0.75)
    assert settings.orchestrator.verification.enabled is False
    assert settings.task.args == {"max_length": 7, "min_length": 5}
    assert settings.run.name == "123"
    assert settings.checkpoint.keep_every is None


@pytest.mark.parametrize(
    "environ",
    [
        {"ONSTREAM_MODEL__CHAT_TEMPLATE_KWARGS": '{"enable_thinking": false, "effort": "low"}'},
        {
            "ONSTREAM_MODEL__CHAT_TEMPLATE_KWARGS__enable_thinking": "false",
            "ONSTREAM_MODEL__CHAT_TEMPLATE_KWARGS__effort": "low",
        },
    ],
    ids=["table", "keys"],
)
def test_variables_of_a_chat_template_come_from_the_environment(environ: dict[str, str]) -> None:
    model = load_settings(environ=environ).model
    assert model.chat_template_kwargs == {"enable_thinking": False, "effort": "low"}


def test_what_a_chat_template_is_called_with_is_no_variable_of_it() -> None:
    with pytest.raises(SettingsError, match=r"model\.chat_template_kwargs.*without tokenize"):
        load_settings(overrides=['model.chat_template_kwargs={"tokenize": false}'], environ={})


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load_settings(environ={"ONSTREAM_REDIS__URL": ""}).redis.url is None


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("trainer.loss.teacher_tua", "trainer.loss.teacher_tau"),
        ("trainer.teacher_tau", "trainer.loss.teacher_tau"),
        ("traner.max_steps", "trainer.max_steps"),
        ("orchestrator.batchsize", "orchestrator.batch_size"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one_in_every_source(
    given: str, near: str, tmp_path: Path
) -> None:
    section, _, key = given.rpartition(".")
    file = write(tmp_path / "a.toml", f"[{section}]\n{key} = 1\n")
    variable, near_variable = (
        "ONSTREAM_" + name.upper().replace(".", "__") for name in (given, near)
    )
    assert problems(f"{given}=1") == [
        f"unknown setting {given}; expected the name of a setting. Did you mean {near}?"
    ]
    assert problems(environ={variable: "1"}) == [
        f"unknown setting: the environment variable {variable}; expected the name of a setting. "
        f"Did you mean {near_variable}?"
    ]
    [from_file] = problems(files=(file,))
    meant = near.partition(".")[0] if "traner" in given else near
    assert f"in {file}; expected the name of a setting. Did you mean {meant}?" in from_file


def test_every_problem_of_every_source_is_told_at_once(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.toml", "[trainer\n")
    bounds = write(
        tmp_path / "bounds.toml",
        '[orchestrator]\ngroup_size = 0\n[inference.sampling]\ntemperature = "hot"\n',
    )
    found = problems(
        "orchestrator.batch_size=0",
        "nonsense",
        "trainer.optim.betas=x",
        "trainer.loss.adv_tau=0",
        environ={"ONSTREAM_TRAINER__LOSS__TYPE": "dpo", "ONSTREAM_UNKNOWN": "1"},
        files=(broken, bounds, tmp_path / "missing.toml"),
    )
    text = "\n".join(found)
    assert len(found) == 10
    for part in (
        "broken.toml: Expected ']'",
        f"orchestrator.group_size = 0 (from {bounds}); expected greater than or equal to 1",
        'inference.sampling.temperature = "hot"',
        "no file ",
        "orchestrator.batch_size = 0; expected greater",
        "--set nonsense; expected section.name=value",
        "trainer.optim.betas=x; expected JSON",
        "trainer.loss.type = dpo (from ONSTREAM_TRAINER__LOSS__TYPE); "
        "expected 'rl', 'sft' or 'custom'",
        "ONSTREAM_UNKNOWN",
        "trainer.loss.teacher_tau = 0.0 with trainer.loss.adv_tau = 0.0; "
        "expected a teacher or rewards to learn from",
    ):
        assert part in text


def test_a_rule_between_settings_is_silent_where_one_of_them_is_wrong_by_itself() -> None:
    assert len(problems("orchestrator.batch_size=-1", "orchestrator.group_size=7")) == 1


def test_one_message_tells_of_a_list_with_a_wrong_item() -> None:
    [told] = problems('deployment.stages=["generate", "judge"]')
    assert told.startswith(
        "deployment.stages[1] = judge; expected 'generate', 'act', 'verify', 'score' or 'train'"
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "half", "[1]"])
def test_a_weight_is_a_finite_number_not_below_zero(value: str) -> None:
    assert problems(f"trainer.loss.teacher_tau={value}")[0].startswith(
        f"trainer.loss.teacher_tau = {value}; expected "
    )


def test_no_message_shows_a_secret(tmp_path: Path) -> None:
    [told] = problems(
        files=(write(tmp_path / "a.toml", '[redis]\nurl = ["redis://:hunter2@host"]\n'),)
    )
    assert "redis.url = ***" in told and "hunter2" not in told


def test_printed_settings_show_no_login_of_an_endpoint() -> None:
    endpoint = "inference.client.base_url=http://me:hidden@gpu-host:8000"
    settings = load_settings(overrides=["inference.engine=server", endpoint], environ={})
    assert "hidden" not in f"{settings!r} {settings}"


def test_a_runs_written_settings_load_again_without_its_secrets(tmp_path: Path) -> None:
    given = load_settings(
        (),
        [
            "run.name=first",
            "redis.url=redis://:hunter2@host",
            'task.args={"a b": [1, 2.5, "é\\"", true], "n": {"m": 1}}',
        ],
        {},
    )
    text = toml_text(given)
    (tmp_path / "moved").mkdir()
    write(tmp_path / "moved" / "settings.toml", text)
    again = load_settings([tmp_path / "moved"], environ={})
    assert "hunter2" not in text and again.redis.url is None
    assert again.run_dir == tmp_path / "moved"
    assert again.task == given.task and again.trainer == given.trainer


def test_a_run_is_found_by_its_name_under_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write(
        tmp_path / "runs" / "mine" / "settings.toml",
        toml_text(load_settings(overrides=["run.name=mine", "run.seed=5"], environ={})),
    )
    settings = load_settings(["mine"], environ={})
    assert (settings.run.seed, settings.run_dir) == (5, tmp_path / "runs" / "mine")
