"""The environment `calculator`: a tool computes, and the student's last message is the answer."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from onstream.pipeline.environments.base import Started, Stepped
from onstream.pipeline.environments.tools import call_tools
from onstream.pipeline.tasks.base import Message, Problem
from onstream.pipeline.tasks.scorers import match_answer

GREATEST = 10**30
_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """Compute an expression of whole numbers.

    Args:
        expression: numbers and + - * // % and brackets, such as "(2 + 3) * 4"
    """
    return str(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)):
            result = value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            result = _OPERATIONS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(f"cannot compute {ast.unparse(node)!r}")
    if abs(result) > GREATEST:
        raise ValueError("the numbers are too large")
    return result


class Calculator:
    """A message that calls the tool is answered; one that does not is the answer, scored by it."""

    def start(self, problem: Problem, seed: int) -> Started:
        """As in the protocol."""
        return Started(problem.messages, str(problem.info["answer"]), [calculate])

    def step(self, state: str, message: Message) -> Stepped:
        """As in the protocol."""
        if results := call_tools(message, [calculate]):
            return Stepped(results, state)
        score = match_answer(message["content"], {"answer": state})
        return Stepped(state=state, done=True, reward=score)
