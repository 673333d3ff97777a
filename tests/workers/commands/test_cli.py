"""The command line, as a user meets it: in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest

from onstream.workers.commands.cli import cli
from onstream.workers.commands.models import make

SNIPPETS = sorted((Path(__file__).parents[2] / "seed_page").glob("*.toml"))
assert SNIPPETS


def all_commands() -> Iterator[list[str]]:
    """The words of every command: those of the group itself are none."""
    yield []
    for name, command in cli.commands.items():
        yield [name]
        if isinstance(command, click.Group):
            yield from ([name, inner] for inner in command.commands)


def onstream(
    *arguments: str, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "onstream", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=clean | (environ or {}), check=False
    )


def overrides(*values: str) -> list[str]:
    """`--set` before each of `values`."""
    return [word for value in values for word in ("--set", value)]


def imported_by(*arguments: str) -> set[str]:
    """The top-level modules that are loaded once the command has run."""
    code = (
        "import sys\nfrom onstream.workers.commands.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        "print('\\n', ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["worker", "--help"],
        ["check"],
        ["check", "nowhere.toml"],
        ["up", "nowhere.toml"],
    ],
)
def test_parsing_and_checking_import_no_torch(arguments: list[str]) -> None:
    loaded = imported_by(*arguments)
    assert {"click", "onstream"} <= loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "numpy"}


@pytest.mark.parametrize("command", list(all_commands()), ids=" ".join)
def test_help_does_not_even_load_the_settings(command: list[str]) -> None:
    heavy = {"pydantic", "rich", "redis", "msgspec", "numpy", "torch", "transformers"}
    assert not imported_by(*command, "--help") & heavy


def test_the_list_of_commands_has_their_summaries_whole_at_80_columns() -> None:
    for group in ([], ["dead"], ["jobs"], ["models"]):
        listed = onstream(*group, "--help", environ={"COLUMNS": "80"}).stdout
        assert "..." not in listed.split("Commands:")[1]


def test_check_without_a_file_is_clean_reward_only_training_of_the_default_student() -> None:
    done = onstream("check")
    assert done.returncode == 0
    assert "generate → verify → train" in done.stdout
    assert "Qwen/Qwen3-0.6B" in done.stdout
    assert "No problems." in done.stdout


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_check_accepts_each_snippet_of_the_seed_page(snippet: Path) -> None:
    assert onstream("check", str(snippet)).returncode == 0


def test_check_prints_where_a_value_came_from_and_hides_secrets(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[redis]\nurl = "redis://:hunter2@host:6379/0"\n')
    environ = {"ONSTREAM_TRAINER__MAX_STEPS": "7"}
    done = onstream("check", str(file), *overrides("run.name=mine"), environ=environ)
    assert done.returncode == 0
    assert 'run.name = "mine"  --set run.name' in done.stdout
    assert "trainer.max_steps = 7  ONSTREAM_TRAINER__MAX_STEPS" in done.stdout
    assert f"redis.url = ***  {file}" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    assert "checkpoint.interval" not in done.stdout


def test_check_json_has_settings_plan_and_problems_in_their_parts_and_hides_secrets(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[redis]\nurl = "redis://:hunter2@host:6379/0"\n')
    sets = overrides("run.name=mine", "orchestrator.batch_size=-1")

    done = onstream("check", str(file), *sets, "--json")

    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["settings"] == {
        "run.name": {"value": "mine", "origin": "--set run.name"},
        "redis.url": {"value": "***", "origin": str(file)},
    }
    assert found["plan"]["route"] == "generate → verify → train"
    assert found["records"]["window"] > 0
    [problem] = [each for each in found["problems"] if "orchestrator.batch_size" in each["names"]]
    assert problem["got"] == "orchestrator.batch_size = -1"
    assert set(problem) == {"names", "got", "expected", "next_step"}
    everything = json.loads(onstream("check", "--all", "--json").stdout)
    assert everything["settings"]["checkpoint.interval"] == {"value": 20, "origin": "default"}


def test_check_prints_the_learning_rate_and_why_it_is_that() -> None:
    done = onstream("check", *overrides("model.name=examples/reverse-text/student"))
    assert 'steps of warm-up; trainer.optim.lr = "auto": hidden size 96' in done.stdout


def test_check_all_prints_settings_at_their_defaults_too() -> None:
    assert "checkpoint.interval = 20  default" in onstream("check", "--all").stdout


def test_check_tells_every_problem_and_exits_2() -> None:
    wrong = ("trainer.loss.teacher_tua=1", "trainer.max_steps=-1", "orchestrator.batch_size=101")
    done = onstream("check", *overrides(*wrong))
    assert done.returncode == 2
    assert "3 problems" in done.stdout
    assert "Did you mean trainer.loss.teacher_tau?" in done.stdout
    assert "trainer.max_steps = -1" in done.stdout
    assert "Set orchestrator.batch_size = 100." in done.stdout


def test_check_warns_of_a_teacher_that_trains_nothing() -> None:
    done = onstream("check", "--set", "teacher_inference.model.name=big")
    assert done.returncode == 0
    assert "metric-only" in done.stdout


@pytest.mark.parametrize("command", [["up"], ["worker", "verifier"], ["status"]])
def test_wrong_settings_end_every_command_with_one_message_a_line_and_exit_2(
    command: list[str],
) -> None:
    done = onstream(*command, *overrides("trainer.max_steps=-1", "nonsense.x=1"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert "Traceback" not in done.stderr


def test_an_unknown_worker_is_refused_with_the_known_ones() -> None:
    done = onstream("worker", "judge")
    assert done.returncode == 2
    assert (
        "'generator', 'environment', 'verifier', 'teacher', 'teacher-external', 'trainer'"
        in done.stderr
    )


def test_a_command_on_a_run_that_does_not_exist_says_so() -> None:
    done = onstream("audit", "no-such-run")
    assert done.returncode == 2
    expected = "expected a TOML file, or the directory or name of a run"
    assert f"no file no-such-run in {Path.cwd()}; {expected}" in done.stderr


def test_a_worker_without_a_redis_says_what_to_set(tmp_path: Path) -> None:
    done = onstream("worker", "verifier", "--set", f"run.dir={tmp_path}")
    assert done.returncode == 2
    assert "redis.url is unset" in done.stderr
    assert "ONSTREAM_REDIS__URL" in done.stderr


def test_a_worker_whose_redis_is_down_exits_5() -> None:
    nowhere = overrides("redis.url=unix:///nowhere.sock", "redis.connect_timeout=0.1")
    done = onstream("worker", "verifier", *nowhere)
    assert done.returncode == 5
    assert "no answer from Redis at unix:///nowhere.sock" in done.stderr


def test_models_make_offers_every_family() -> None:
    from onstream.workers.tiny_models.vlm_families import VlmFamily  # brings torch

    [option] = [option for option in make.params if option.name == "family"]
    assert set(option.type.to_info_dict()["choices"]) == set(get_args(VlmFamily))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["eval", "{run}"], "`onstream eval`"),
        (["export", "{run}", "--out", "{run}/out"], "`onstream export`"),
        (["models", "make", "reverse-text", "--out", "{run}/out"], "`onstream models make`"),
    ],
    ids=["eval", "export", "models make"],
)
def test_a_command_without_torch_says_what_to_install(
    tmp_path: Path, words: list[str], named: str
) -> None:
    (tmp_path / "settings.toml").write_text(f'[model]\nname = "{tmp_path}"\n')
    arguments = [word.format(run=tmp_path) for word in words]
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        f"from onstream.workers.commands.cli import main\nmain({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"onstream: {named} where torch is not installed" in done.stderr
    assert "pip install '.[train]'" in done.stderr
    assert "Traceback" not in done.stderr
