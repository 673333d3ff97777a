"""`[teachers.<name>]`: the streams that follow, the worker of one, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.settings.load import load_settings, resolve
from onstream.settings.named_teachers import teacher_weights, with_teacher
from onstream.settings.plan import make_plan, refuse_differences
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.settings.toml import toml_text
from onstream.workers.trainer.teachers import drawn_teacher

CPU = ["deployment.device=cpu", "trainer.loss.teacher_tau=1", "task.name=reverse-text"]
MATH = ["teachers.math.local.model.name=big", "teachers.math.weight=3"]
CODE = [
    "teachers.code.external.model.name=coder",
    "teachers.code.external.client.base_url=http://me:secret@host/v1",
    "teachers.code.external.client.api_key=sesame",
]
DEFAULT = ["teacher_inference.model.name=general"]


def loaded(*overrides: str) -> Settings:
    return load_settings(overrides=[*CPU, *overrides], environ={})


def test_each_teacher_by_name_has_a_stream_and_workers_of_its_own() -> None:
    plan = make_plan(loaded(*MATH, *CODE))
    assert plan.streams == ("generate", "verify", "score:math", "score:code", "train")
    assert plan.route == ("verify", "score", "train")
    assert plan.consumers("score:math") == ["teacher --name math"]
    assert plan.consumers("score:code") == ["teacher-external --name code"]
    assert "teacher" not in plan.workers, "the default teacher is configured nowhere"
    assert plan.path_text == "generate → verify → score:math or score:code → train"
    assert plan.worker_counts == {
        "generator": 1,
        "verifier": 1,
        "trainer": 1,
        "teacher --name math": 1,
        "teacher-external --name code": 1,
    }


def test_the_teacher_of_the_page_is_one_of_them_where_it_is_configured() -> None:
    settings = loaded(*MATH, *DEFAULT)
    plan = make_plan(settings)
    assert plan.teachers == ("default", "math")
    assert plan.streams == ("generate", "verify", "score", "score:math", "train")
    assert plan.consumers("score") == ["teacher"]
    assert teacher_weights(settings) == {"default": 1.0, "math": 3.0}


def test_without_a_table_the_streams_are_those_of_the_stages() -> None:
    plan = make_plan(loaded(*DEFAULT))
    assert (plan.teachers, plan.streams) == ((), ("generate", "verify", "score", "train"))


def test_a_worker_finds_its_teacher_where_the_default_one_would_be() -> None:
    settings = loaded(*MATH, *CODE, *DEFAULT)
    math = with_teacher(settings, "math")
    assert math.teacher_inference.model.name == "big"
    assert math.orchestrator.teacher_model is None
    code = with_teacher(settings, "code").orchestrator.teacher_model
    assert code is not None and code.model.name == "coder"
    assert with_teacher(settings, "default") is settings


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no teacher has the name 'maths'; expected one of math"):
        with_teacher(loaded(*MATH), "maths")


def test_the_runs_own_file_loads_again_without_secrets(tmp_path: Path) -> None:
    settings = loaded(*MATH, *CODE)
    file = tmp_path / "settings.toml"
    file.write_text(toml_text(settings))
    assert "sesame" not in file.read_text() and "secret" not in file.read_text()
    again = load_settings([file], environ={})
    assert again.teachers["math"] == settings.teachers["math"]
    assert make_plan(again).run_settings == make_plan(settings).run_settings
    assert "sesame" not in str(make_plan(settings)) and "secret" not in str(make_plan(settings))


def test_a_worker_with_another_model_or_weight_is_not_the_runs() -> None:
    plan = make_plan(loaded(*MATH))
    other = make_plan(loaded(*MATH, "teachers.math.local.model.name=small"))
    with pytest.raises(UserError, match=r"teachers\.math\.local\.model\.name"):
        refuse_differences(other, plan)
    with pytest.raises(UserError, match=r"teachers\.code"):
        refuse_differences(make_plan(loaded(*MATH, *CODE)), plan)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teachers.math.weight=1"], r"\[teachers.math\] has neither of `local` and `external`"),
        ([*MATH, "teachers.math.external.model.name=x"], "has both of `local` and `external`"),
        (["teachers.default.local.model.name=x"], r"\[teachers.default\]; expected another name"),
        (["teachers.Math.local.model.name=x"], "teachers.Math"),
        ([*MATH, "teachers.math.local.engine=vllm"], "no server is started for a teacher by name"),
        (["teachers.code.external.model.name=x"], "teachers.code.external.client.base_url = "),
        (["teachers.code.external.client.base_url=http://a/v1"], "the model's name at"),
        (["teachers.math.local.model.name=x", "teachers.math.weight=0"], "a weight above 0"),
        ([*MATH, "trainer.loss.type=sft", "trainer.loss.teacher_tau=null"], "trainer.loss.type"),
        (
            [*MATH, "teachers.math.local.model.nam=x"],
            "unknown setting teachers.math.local",
        ),
        ([*CODE, "teachers.code.external.client.api_keys=hush"], "unknown setting"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], said: str) -> None:
    problems = resolve((), [*CPU, *overrides], {}).problems
    with pytest.raises(SettingsError, match=said) as refusal:
        raise SettingsError(problems)
    assert "sesame" not in str(refusal.value)


def test_a_share_is_drawn_by_the_weights_and_stays_with_the_problem() -> None:
    weights = {"math": 3.0, "code": 1.0, "none": 0.0}
    drawn = [drawn_teacher(weights, 7, problem) for problem in range(4000)]
    counts = Counter(drawn)
    assert counts["math"] == pytest.approx(3000, abs=100) and counts["none"] == 0
    assert drawn[:50] == [drawn_teacher(weights, 7, problem) for problem in range(50)]
