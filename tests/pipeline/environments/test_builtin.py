"""The built-in environments, played by hand."""

from __future__ import annotations

import msgspec
import pytest

from onstream.pipeline.environments import Stepped, load_environment
from onstream.pipeline.environments.calculator import Calculator, calculate
from onstream.pipeline.environments.sort_turns import Letters, SortTurns
from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import Message, Problem
from onstream.settings.root import Settings


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def test_a_call_of_the_calculator_is_answered_and_the_answer_without_one_is_scored() -> None:
    problem = Problem([{"role": "user", "content": "Compute: 12-34"}], {"answer": "-22"})
    environment = Calculator()
    started = environment.start(problem, seed=1)
    call = '<tool_call>{"name": "calculate", "arguments": {"expression": "12-34"}}</tool_call>'
    stepped = environment.step(started.state, said(call))
    assert (started.messages, started.tools) == (problem.messages, [calculate])
    assert stepped == Stepped([{"role": "tool", "content": "-22"}], "-22")
    assert environment.step(stepped.state, said("-22")) == Stepped(
        [], "-22", done=True, reward={"reward": 1.0, "similarity": 1.0}
    )


@pytest.mark.parametrize(
    ("expression", "value"), [("(2 + 3) * 4", "20"), ("-7 // 2", "-4"), ("7 % 4", "3")]
)
def test_the_calculator_computes_whole_numbers(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["2 ** 9", "open('x')", "10" * 16 + "*" + "10" * 16, "1.5"])
def test_the_calculator_computes_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError):
        calculate(expression)


def test_letters_are_added_turn_by_turn_and_each_answer_is_worth_a_third() -> None:
    problem = Problem([{"role": "user", "content": "Sort: cab"}], {"answer": "abc"})
    environment = SortTurns()
    assert environment.start(problem, seed=1) == environment.start(problem, seed=1)
    assert environment.start(problem, seed=1) != environment.start(problem, seed=2)
    first = environment.step(Letters("abc", ["zb"]), said("abc"))
    assert first.messages == [{"role": "user", "content": "Add: zb"}]
    assert first.reward == {"reward": 1 / 3, "similarity": 1 / 3}
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(first.state), type=Letters)
    last = environment.step(state, said("abbz"))
    assert last.done
    assert last.reward == {"reward": 0.0, "similarity": pytest.approx(3 / 5 / 3)}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("calculater", "is not an environment; expected one of calculator, sort-turns"),
        ("nowhere:Game", "No module named 'nowhere'"),
        ("string:capwords", "makes no environment: TypeError"),
    ],
)
def test_what_is_no_environment_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_environment(Settings.model_validate({"task": {"environment": name}}))
