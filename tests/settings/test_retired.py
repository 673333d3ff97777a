"""A run that an earlier version began goes on, though some of its settings are gone since.

`earlier_runs` holds the plans and settings files of two runs as that version wrote them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.settings.load import load_settings, resolve
from onstream.settings.plan import Plan, differences, make_plan, refuse_differences
from onstream.settings.retired import RETIRED

EARLIER = Path(__file__).parent / "earlier_runs"
RUNS = ("rl", "sft")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of the run `rl`, whose settings may be written over."""
    return Path(shutil.copytree(EARLIER / "rl", tmp_path / "reverse-text"))


def earlier_plan(run: str) -> Plan:
    return Plan.decode((EARLIER / run / "plan.json").read_bytes())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("named_by", ["directory", "file"])
def test_the_settings_file_of_an_earlier_run_resumes_it(run: str, named_by: str) -> None:
    source = EARLIER / run if named_by == "directory" else EARLIER / run / "settings.toml"
    ours = make_plan(load_settings([source], ["run.name=reverse-text"], environ={}))
    assert differences(ours, earlier_plan(run)) == []
    assert (ours.route, ours.workers) == (earlier_plan(run).route, earlier_plan(run).workers)


def test_a_retired_setting_that_changed_the_run_is_refused_with_what_to_do() -> None:
    theirs = earlier_plan("rl")
    theirs.run_settings["inference.sampling.top_k"] = 5
    ours = make_plan(load_settings([EARLIER / "rl"], ["run.name=reverse-text"], environ={}))
    with pytest.raises(UserError) as refusal:
        refuse_differences(ours, theirs)
    assert "inference.sampling.top_k (retired, the run has 5)" in str(refusal.value)
    assert "the version that started the run" in str(refusal.value)


@pytest.mark.parametrize(
    ("old", "new", "advice"),
    [
        ("generators = 1", "generators = 4", "Set deployment.workers.generator instead."),
        ("top_p = 1.0", "top_p = 0.9", "Leave it out"),
        ("[log]", "[deployment.scale]\nteacher = 2\n[log]", "name the kind in deployment."),
    ],
)
def test_a_retired_setting_that_says_something_is_an_error_in_a_runs_own_file_too(
    run: Path, old: str, new: str, advice: str
) -> None:
    file = run / "settings.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    (problem,) = resolve([run], environ={}).problems
    assert "retired setting" in str(problem)
    assert advice in str(problem)


def test_a_retired_setting_is_an_error_in_a_file_of_the_users_even_at_its_default(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[deployment]\ngenerators = 1\n")
    (problem,) = resolve([file], environ={}).problems
    assert str(problem) == (
        f"retired setting deployment.generators in {file}; expected the name of a setting. "
        "Set deployment.workers.generator instead."
    )


@pytest.mark.parametrize("name", list(RETIRED))
def test_a_retired_setting_names_what_takes_its_place_in_every_source(name: str) -> None:
    variable = "ONSTREAM_" + name.upper().replace(".", "__")
    value = '{"teacher": 2}' if RETIRED[name].default == {} else "2"
    for overrides, environ in (([f"{name}={value}"], {}), ([], {variable: value})):
        (problem,) = resolve(overrides=overrides, environ=environ).problems
        assert "retired setting" in str(problem)
        assert RETIRED[name].next_step in str(problem)


@pytest.mark.parametrize(("begun_with", "goes_on_with"), [(0, 0), (4, "auto")])
def test_a_run_that_began_with_an_earlier_default_goes_on_so_where_nothing_is_said_of_it(
    run: Path, tmp_path: Path, begun_with: int, goes_on_with: object
) -> None:
    """The same command as before: a file of the user's, not the one that the run wrote."""
    plan = earlier_plan("rl")
    plan.run_settings["trainer.loss.teacher_top_k"] = begun_with
    (run / "plan.json").write_bytes(plan.encode())
    mine = tmp_path / "mine.toml"
    mine.write_text(f'[run]\ndir = "{tmp_path}"\nname = "reverse-text"\n')
    found = load_settings([mine], environ={})
    assert found.trainer.loss.teacher_top_k == goes_on_with
    said = load_settings([mine], ["trainer.loss.teacher_top_k=auto"], environ={})
    assert said.trainer.loss.teacher_top_k == "auto"
    hard = ["trainer.loss.type=sft", "orchestrator.teacher_rollout_model.model.name=big"]
    sft = resolve([mine], hard, environ={}).settings
    assert sft is not None and sft.trainer.loss.type == "sft", "which has no such setting"


def test_a_run_of_an_earlier_version_keeps_the_rate_and_warm_up_that_were_its_defaults(
    run: Path, tmp_path: Path
) -> None:
    plan = run / "plan.json"
    kept = json.loads(plan.read_bytes())
    kept["run_settings"] |= {"trainer.optim.lr": 1e-5, "trainer.optim.warmup": 0}
    plan.write_text(json.dumps(kept))
    here = [f"run.dir={tmp_path}", f"run.name={run.name}"]
    same = load_settings([], here, environ={}).trainer.optim
    assert (same.lr, same.warmup) == (1e-5, 0)
    said = load_settings([], [*here, "trainer.optim.warmup=3"], environ={}).trainer.optim
    assert (said.lr, said.warmup) == (1e-5, 3)
    new = load_settings([], [f"run.dir={tmp_path}", "run.name=other"], environ={}).trainer.optim
    assert (new.lr, new.warmup) == ("auto", 10)
