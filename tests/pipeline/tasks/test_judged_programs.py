"""Programs that mean harm score 0, and honest ones what they scored when nobody meant harm."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import Scorer, load_scorer
from onstream.settings.root import Settings
from tests.pipeline.tasks.attacks import (
    ATTACKS,
    CODE_TESTS,
    OUTPUT_ATTACKS,
    OUTPUT_TESTS,
    SERVER,
)
from tests.pipeline.tasks.honest_programs import HONEST

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sandbox is made of Linux's own parts"
)

LIMITS = {"wall": 4.0, "cpu": 1, "memory": 96, "processes": 6, "output": 10_000}
BOUND = {"wall": 1.0}
"""For attacks that end with the time alone."""


LIES = [name for name in ATTACKS if "everything" in name or name.startswith("another ma")]

COMPARISONS = [
    "assert abs(solve(4) - 8) < 1e-9",
    "import math\nassert math.isclose(solve(4), 8)",
    "assert math.isclose(solve(4), 8)",
    "assert solve(4) >= 8 and solve(4) <= 8",
    "assert {8: True}.get(solve(4))",
]


def scorer(**limits: Any) -> Scorer:
    verification = {"sandbox": LIMITS | limits}
    values = {
        "task": {"name": "jsonl", "path": "problems.jsonl", "scorer": "code"},
        "orchestrator": {"verification": verification},
    }
    try:
        return load_scorer(Settings.model_validate(values))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def score() -> Scorer:
    return scorer()


@pytest.fixture(scope="module")
def score_briefly() -> Scorer:
    return scorer(**BOUND)


def reward(score: Scorer, program: str, tests: Any, **info: Any) -> float:
    verdict = score(program, {"tests": tests, **info})
    assert isinstance(verdict, dict)
    return float(verdict["reward"])


def test_a_program_that_solves_the_problem_of_the_attacks_is_rewarded(score: Scorer) -> None:
    assert reward(score, "def solve(n):\n    return 2 * n", CODE_TESTS) == 1.0
    assert reward(score, "print(2 * int(input()))", OUTPUT_TESTS) == 1.0


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_tests_that_are_code_scores_0(score_briefly: Scorer, name: str) -> None:
    assert reward(score_briefly, ATTACKS[name], CODE_TESTS) == 0.0


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("tests", COMPARISONS)
def test_no_object_lies_its_way_through_one_comparison(
    score: Scorer, name: str, tests: str
) -> None:
    assert reward(score, ATTACKS[name], tests) == 0.0


@pytest.mark.parametrize("tests", COMPARISONS)
def test_the_right_number_passes_each_comparison(score: Scorer, tests: str) -> None:
    assert reward(score, "def solve(n):\n    return 2 * n", tests) == 1.0


EMPTIES = {
    "a function": "def f(items):\n    items.clear()\n    return []",
    "a forged answer": f"{SERVER}\ndef f(items):\n    s = server()\n"
    "    s._channel.send(['ok', s._nonce, ['list'], [['list', ['list']], ['dict']]])",
}


@pytest.mark.parametrize("program", EMPTIES.values(), ids=EMPTIES)
def test_a_program_that_empties_the_list_that_it_must_sort_scores_0(
    score: Scorer, program: str
) -> None:
    tests = "items = [3, 1, 2]\nassert f(items) == sorted(items)"
    assert reward(score, program, tests) == 0.0
    assert reward(score, "def f(items):\n    return sorted(items)", tests) == 1.0


PRIES = """
def f(given):
    names = ("__globals__", "__class__", "gi_frame", "f_globals", "__self__", "__init__")
    for name in names:
        try:
            value = getattr(given, name)
            if name != "__class__" and value is not None and "method" not in str(value):
                return 42
        except AttributeError:
            continue
    try:
        return 42 if given("__import__('os')._exit(0)") == 0 else 0
    except Exception:
        return 0
"""


@pytest.mark.parametrize("given", ["lambda x: 1", "(x for x in 'a')", "Own()", "Own", "Own().go"])
def test_what_tests_pass_shows_nothing_of_their_variables(score: Scorer, given: str) -> None:
    tests = f"class Own:\n    def go(self, *args): return 1\nassert f({given}) == 42"
    assert reward(score, PRIES, tests) == 0.0


@pytest.mark.parametrize("name", OUTPUT_ATTACKS)
def test_an_attack_on_tests_of_output_scores_0(score_briefly: Scorer, name: str) -> None:
    assert reward(score_briefly, OUTPUT_ATTACKS[name], OUTPUT_TESTS) == 0.0


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_scores_what_its_answers_are_worth(score: Scorer, name: str) -> None:
    program, tests, expected = HONEST[name]
    assert reward(score, program, tests) == expected


def test_a_check_that_nobody_calls_is_called_with_the_entry_point(score: Scorer) -> None:
    tests = "def check(candidate):\n    assert candidate(2) == 4"
    assert reward(score, "def f(n): return 2 * n", tests, entry_point="f") == 1.0
    assert reward(score, "def f(n): return n", tests, entry_point="f") == 0.0


def test_the_entry_point_may_bear_a_name_of_pythons(score: Scorer) -> None:
    program = "def sum(a, b): return a + b\ndef half(a): return a / 2\ndef abs(a): return 0"
    tests = "assert sum(half(2), 1) == 2\nassert abs(sum(1, 1) - 2) < 1e-9 and abs(-1) == 1"
    assert reward(score, program, tests, entry_point="sum") == 1.0
    assert reward(score, program, tests) == 0.0  # without, `sum` is Python's beside `half`


@pytest.mark.parametrize(
    "tests, words",
    [
        ("def check(candidate):\n    assert candidate(2) == 4", "never call the program"),
        ("def test_f():\n    assert f(2) == 4", "never call the program"),
        ("assert f(2) ==", "are not Python"),
    ],
)
def test_tests_that_cannot_tell_leave_the_rollout_unscored(
    score: Scorer, tests: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        score("def f(n): return 2 * n", {"tests": tests})
