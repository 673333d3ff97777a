"""`make real`: its problems, its settings, and when it says that nothing was shown. The model is
fetched and trained by that command alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.real import __main__ as real
from benchmarks.real.intervals import interval
from benchmarks.real.problems import HELD_OUT, TRAINED, problem, write_problems
from onstream.pipeline.tasks.answer_scorers.json_schema import score
from onstream.settings.load import resolve
from onstream.settings.rules import warnings_of
from onstream.workers.launcher.preflight import find_problems

ROOT = Path(__file__).parents[1]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_no_name_and_no_city_of_a_held_out_problem_is_trained_on(tmp_path: Path) -> None:
    trained, held_out = tmp_path / "trained.jsonl", tmp_path / "held_out.jsonl"
    write_problems(trained, held_out)
    rows = rows_of(trained), rows_of(held_out)
    assert [len(each) for each in rows] == [TRAINED, HELD_OUT]
    assert len({row["prompt"] for each in rows for row in each}) == TRAINED + HELD_OUT
    for key in ("name", "city"):
        known, asked = ({row["answer"]["const"][key] for row in each} for each in rows)
        assert known.isdisjoint(asked)


def test_one_answer_is_right_however_it_is_laid_out() -> None:
    row = problem("Ruth", 78, "London", Random(0))
    info = {"answer": json.dumps(row["answer"])}
    person = {"name": "Ruth", "age": 78, "city": "London"}
    answers = [
        json.dumps(person),
        json.dumps(person, indent=2),
        json.dumps({**person, "age": 87}),
        json.dumps({**person, "job": "nurse"}),
        f"It is {json.dumps(person)}",
    ]
    assert [score(answer, info)["reward"] for answer in answers] == [1, 1, 0, 0, 0]


def stand_in(directory: Path) -> list[str]:
    """Settings that put a tiny student, of a context as long as needed, and fresh files in place.

    A character is a token to it.
    """
    trained, held_out = directory / "trained.jsonl", directory / "held_out.jsonl"
    write_problems(trained, held_out)
    student = directory / "student"
    shutil.copytree(ROOT / "examples/reverse-text/student", student)
    config = student / "config.json"
    longer = {**json.loads(config.read_text()), "max_position_embeddings": 2048}
    config.write_text(json.dumps(longer))
    return [f"task.path={trained}", f"task.eval_path={held_out}", f"model.name={student}"]


@pytest.mark.parametrize(("extra", "warned"), [([], []), ([real.WITHOUT_EXAMPLES], [True])])
def test_the_settings_check_clean_and_the_control_is_told_to_learn_nothing(
    extra: list[str], warned: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    resolved = resolve([real.SETTINGS], overrides=[*stand_in(tmp_path), *extra], environ={})
    assert [*resolved.problems, *find_problems(resolved, online=False)] == []
    assert resolved.settings is not None
    assert ["nothing to learn" in line for line in warnings_of(resolved.settings)] == warned


def test_an_interval_of_a_share_stays_between_nothing_and_all() -> None:
    assert interval(128, 256) == pytest.approx((0.4392, 0.5608), abs=1e-4)
    assert interval(0, 256) == pytest.approx((0, 0.0148), abs=1e-4)
    assert interval(256, 256) == pytest.approx((0.9852, 1), abs=1e-4)


@pytest.mark.parametrize(
    ("taught", "control", "shown"), [(0.7, 0.2, True), (0.29, 0.2, False), (0.7, 0.7, False)]
)
def test_it_fails_where_a_run_does_not_rise_clearly_or_its_control_does(
    taught: float, control: float, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def up(command: str, *arguments: str) -> None:
        name = next(word for word in arguments if word.startswith("run.name=")).split("=")[1]
        after = control if real.WITHOUT_EXAMPLES in arguments else taught
        (tmp_path / name / "exported").mkdir(parents=True)
        found = {"before": 0.22, "after": after, "samples": 256}
        (tmp_path / name / "report.json").write_text(json.dumps({"eval": found, "seconds": 60}))

    monkeypatch.setattr("sys.argv", ["real", "--seeds", "0"])
    monkeypatch.setattr(real, "write_problems", lambda *files: None)
    monkeypatch.setattr(real, "right_answers", lambda directory, problems: 179)
    monkeypatch.setattr(real, "RUNS", tmp_path)
    monkeypatch.setattr(real, "onstream", up)
    if shown:
        real.main()
    else:
        with pytest.raises(SystemExit, match="not shown"):
            real.main()
