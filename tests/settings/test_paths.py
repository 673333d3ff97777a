"""The paths of a run are absolute, so that it goes on from any directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.load import load_settings
from onstream.settings.paths import with_absolute_paths
from onstream.settings.plan import Plan, differences, make_plan, under_name, with_given_paths
from onstream.settings.root import Settings
from onstream.settings.toml import toml_text

GIVEN = (
    "model.name=models/student",
    "teacher_inference.model.name=models/teacher",
    "trainer.loss.teacher_tau=1",
    "task.name=jsonl",
    "task.path=data.jsonl",
    "task.scorer=mine:score",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory where the run is made."""
    for model in ("student", "teacher"):
        (tmp_path / "home" / "models" / model).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def settings(*overrides: str) -> Settings:
    return load_settings(overrides=[*GIVEN, *overrides], environ={})


def test_every_path_is_absolute_in_the_settings_that_a_run_keeps(home: Path) -> None:
    kept = with_absolute_paths(settings("run.dir=runs", "redis.server_bin=redis-server"))
    assert kept.model.name == f"{home}/models/student"
    assert kept.teacher_inference.model.name == f"{home}/models/teacher"
    assert (kept.task.path, kept.run.dir) == (home / "data.jsonl", home / "runs")
    assert kept.run.modules == home
    assert kept.redis.server_bin == Path("redis-server")
    assert with_absolute_paths(kept) == kept


@pytest.mark.parametrize("template", ["models/teacher", "chat.jinja"])
def test_the_chat_template_of_a_student_is_found_from_any_directory(
    home: Path, template: str
) -> None:
    (home / "chat.jinja").touch()
    given = settings(f"model.chat_template={template}")
    assert with_absolute_paths(given).model.chat_template == f"{home}/{template}"
    assert make_plan(given).given["model.chat_template"] == template
    hub = settings("model.chat_template=Qwen/Qwen3-8B")
    assert with_absolute_paths(hub).model.chat_template == "Qwen/Qwen3-8B"


def test_names_of_the_hub_and_of_endpoints_stay_as_they_are() -> None:
    hub = settings("model.name=Qwen/Qwen3-0.6B", "task.name=hf:a/b", "task.path=null")
    assert with_absolute_paths(hub).model.name == "Qwen/Qwen3-0.6B"
    assert with_absolute_paths(hub).task.name == "hf:a/b"
    served = settings("inference.engine=server", "inference.client.base_url=http://a")
    assert with_absolute_paths(served).inference.client.model == "models/student"


def test_the_plan_shows_them_absolute(home: Path) -> None:
    plan = make_plan(settings())
    assert (plan.student, plan.teacher) == (f"{home}/models/student", f"{home}/models/teacher")
    assert plan.run_settings["model.name"] == f"{home}/models/student"


def test_the_settings_that_a_run_kept_are_its_own_in_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_plan(settings())
    kept = tmp_path / "kept.toml"
    kept.write_text(toml_text(with_absolute_paths(settings())))
    monkeypatch.chdir(tmp_path)
    assert differences(make_plan(load_settings([kept], environ={})), theirs) == []


def test_the_same_files_elsewhere_on_another_machine_are_the_runs_own(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_plan(settings())
    home.rename(tmp_path / "other-home")
    monkeypatch.chdir(tmp_path / "other-home")
    ours = make_plan(settings())
    assert ours.student != theirs.student
    assert differences(ours, theirs) == []
    assert [one.name for one in differences(make_plan(settings("model.name=models")), theirs)] == [
        "model.name"
    ]


def test_a_resume_by_the_kept_settings_does_not_shut_such_workers_out(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_plan(settings())
    resumed = with_given_paths(make_plan(with_absolute_paths(settings())), first)
    home.rename(tmp_path / "other-home")
    monkeypatch.chdir(tmp_path / "other-home")
    assert differences(make_plan(settings()), Plan.decode(resumed.encode())) == []


def test_a_run_whose_plan_has_paths_as_they_were_given_is_resumed() -> None:
    plan = make_plan(settings())
    relative = {name: plan.given.get(name, value) for name, value in plan.run_settings.items()}
    earlier = Plan.decode(plan.encode())
    earlier.run_settings.update(relative)
    earlier.given.clear()
    assert earlier.run_settings["model.name"] == "models/student"
    assert differences(plan, earlier) == []
    by_the_kept_settings = make_plan(with_absolute_paths(settings()))
    assert not by_the_kept_settings.given
    assert differences(by_the_kept_settings, earlier) == []
    elsewhere = make_plan(settings("model.name=/another/student"))
    assert [one.name for one in differences(elsewhere, earlier)] == ["model.name"]


def test_a_plan_under_another_name_differs_in_nothing_else() -> None:
    plan = make_plan(settings())
    assert differences(under_name(plan, "other"), make_plan(settings("run.name=other"))) == []
