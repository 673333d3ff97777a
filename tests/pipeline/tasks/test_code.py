"""The scorer that runs programs: what is a program, what is rewarded, and where it is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import Scorer, load_scorer
from onstream.pipeline.tasks.code import program_of
from onstream.pipeline.tasks.sandbox import Sandbox
from onstream.settings.root import Settings

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sandbox is made of Linux's own parts"
)

LIMITS = {"wall": 1.0, "cpu": 1, "memory": 96, "processes": 6, "output": 10_000}
REVERSE = [{"input": "abc", "output": "cba"}, {"input": "xy\n", "output": "yx\n"}]


def settings(**verification: Any) -> Settings:
    orchestrator = {"verification": {"sandbox": LIMITS, **verification}}
    return Settings.model_validate(
        {
            "task": {"name": "jsonl", "path": "problems.jsonl", "scorer": "code"},
            "orchestrator": orchestrator,
        }
    )


@pytest.fixture(scope="module")
def score() -> Scorer:
    try:
        return load_scorer(settings())
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "completion, program",
    [
        ("print(1)", "print(1)"),
        ("<think>```\nno\n```</think>So:\n```python\nprint(1)\n```\nThat is it.", "print(1)\n"),
        ("```py\nprint(1)\n```\nor better\n```\nprint(2)\n```", "print(2)\n"),
        ("```python\nprint(1)", "print(1)"),
    ],
)
def test_the_program_is_the_last_fenced_block_of_the_answer_or_all_of_it(
    completion: str, program: str
) -> None:
    assert program_of(completion) == program


def test_a_right_program_scores_1_and_a_half_right_one_0(score: Scorer) -> None:
    assert score("```python\nprint(input()[::-1])\n```", {"tests": REVERSE}) == {
        "reward": 1.0,
        "passed": 1.0,
    }
    assert score("print('cba')", {"tests": REVERSE}) == {
        "reward": 0.0,
        "passed": 0.5,
        "program_wrong_output": 1.0,
    }


def test_tests_may_be_code_that_follows_the_program(score: Scorer) -> None:
    tests = "assert double(2) == 4\nassert double(0) == 0"
    assert score("def double(n):\n    return 2 * n", {"tests": tests}) == {
        "reward": 1.0,
        "passed": 1.0,
    }
    assert score("def double(n):\n    return 4", {"tests": tests}) == {
        "reward": 0.0,
        "passed": 0.0,
        "program_failed": 1.0,
    }


@pytest.mark.parametrize(
    "attack, reasons",
    [
        (
            "import os\nwhile True:\n"
            "    try:\n        os.fork()\n    except OSError:\n        pass",
            {"timed_out", "cpu_limit", "killed"},
        ),
        (
            "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True:\n    pass",
            {"timed_out", "cpu_limit"},
        ),
        ("import os\nwhile True:\n    os.write(1, bytes(65536))", {"output_limit"}),
        ("import os\nprint(open(f'/proc/{os.getppid()}/environ').read())", {"failed"}),
    ],
    ids=["fork bomb", "endless loop", "endless output", "parent's environment"],
)
def test_an_attack_scores_0_with_its_reason(score: Scorer, attack: str, reasons: set[str]) -> None:
    verdict = score(attack, {"tests": [{"output": "cba"}]})
    assert isinstance(verdict, dict)
    assert (verdict["reward"], verdict["passed"]) == (0.0, 0.0)
    assert set(verdict) - {"reward", "passed"} <= {f"program_{reason}" for reason in reasons}
    assert len(verdict) == 3


@pytest.mark.parametrize("tests", [None, [], "", [1], [{"input": "a"}], 7])
def test_a_problem_without_usable_tests_is_the_problem_s_fault(
    score: Scorer, tests: object
) -> None:
    with pytest.raises(ValueError, match="test"):
        score("print(1)", {"tests": tests})


def test_a_machine_that_permits_no_sandbox_refuses_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Sandbox, "missing", lambda self: ["user", "network"])
    with pytest.raises(UserError, match="an unprivileged user, a network of its own"):
        load_scorer(settings())
    load_scorer(settings(allow_unsandboxed=True))
    assert "does without an unprivileged user" in capsys.readouterr().err


def test_a_machine_without_network_namespaces_is_told_of_and_used(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Sandbox, "missing", lambda self: ["network"])
    load_scorer(settings())
    assert (
        "does without a network of its own (programs may open connections)"
        in capsys.readouterr().err
    )


def test_a_program_may_not_have_more_time_than_its_scorer(score: Scorer) -> None:
    with pytest.raises(UserError, match=r"orchestrator\.verification\.sandbox\.wall"):
        load_scorer(settings(timeout=0.5))
