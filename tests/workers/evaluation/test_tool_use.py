"""The pair of examples/tool-use: what it knows, and that it knows it by the tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onstream.settings.load import load_settings
from onstream.workers.evaluation.greedy import evaluate

EXAMPLE = Path(__file__).parents[3] / "examples/tool-use"
WRONG = "task.environment=tests.workers.environment.wrong_calculator:WrongCalculator"
EPISODES = 64
CALLS = 2


def evaluated(model: str, *overrides: str) -> dict[str, Any]:
    sets = [f"eval.samples={EPISODES}", *overrides]
    return evaluate(EXAMPLE / model, load_settings([EXAMPLE / "onstream.toml"], sets, environ={}))


def test_the_teacher_calls_the_tool_for_each_operation_and_solves_nearly_all() -> None:
    result = evaluated("teacher")
    assert result["exact"] > 0.9
    assert result["tool_calls"] == pytest.approx(CALLS, abs=0.2)
    assert result["turns"] == pytest.approx(CALLS + 1, abs=0.2)


def test_with_a_tool_that_answers_wrongly_the_teacher_solves_next_to_nothing() -> None:
    result = evaluated("teacher", WRONG)
    assert result["exact"] < 0.05
    assert result["tool_calls"] == pytest.approx(CALLS, abs=0.2)


def test_the_student_solves_some() -> None:
    assert 0.05 < evaluated("student")["exact"] <= 0.4


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_the_files_are_small(model: str) -> None:
    assert sum(file.stat().st_size for file in (EXAMPLE / model).iterdir()) < 2e6
