r"""The scorer `math`: whether two mathematical expressions are equal, by the library math-verify.

Its own time limits are turned off: they need signals, and do not end a computation in C.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from sympy import Basic, false
from sympy.core.relational import Relational

from onstream.pipeline.tasks.answer_scorers.boxed import last_boxed
from onstream.pipeline.tasks.scorers import answer_text


def score(completion: str, info: dict[str, Any]) -> dict[str, float]:
    r"""1 where the answer equals `info["answer"]`, in whatever form; else 0.

    The answer is the last `\boxed{…}`, or else the last expression in the text. The part `answered`
    is 1 where there is one; it is shown, not rewarded.

    >>> score(r"That is \boxed{\frac{1}{2}}.", {"answer": "0.5"})
    {'reward': 1.0, 'answered': 1.0}

    Raises:
        ValueError: `info["answer"]` is no expression.
    """
    right_answer = _right_answer(str(info["answer"]))
    text = answer_text(completion)
    boxed = last_boxed(text)
    given = parse(text if boxed is None else _in_box(boxed), parsing_timeout=None)
    right = not _claims_what_is_false(given) and verify(right_answer, given, timeout_seconds=None)
    return {"reward": float(right), "answered": float(bool(given))}


@lru_cache(maxsize=256)  # the rollouts of a group have one answer
def _right_answer(answer: str) -> list[Any]:
    solution = answer.rpartition("####")[2].strip()
    is_text = "\\boxed" in solution or solution.count("$") > 1
    parsed: list[Any] = parse(solution if is_text else _in_box(solution), parsing_timeout=None)
    if not parsed:
        raise ValueError(f"the problem's answer is {answer!r}; expected a mathematical expression")
    return parsed


def _in_box(expression: str) -> str:
    return f"\\boxed{{{expression}}}"


def _claims_what_is_false(given: list[Any]) -> bool:
    """Whether `given` is a chain like `1 = 72`, of which math-verify reads the last part alone.

    One that sympy cannot decide, such as `i < 72`, is taken for false.
    """
    relations = (
        relation
        for expression in given
        if isinstance(expression, Basic)
        for relation in expression.atoms(Relational)
    )
    try:
        return any(not each.free_symbols and each.doit() == false for each in relations)
    except Exception:  # sympy raises dozens of types, at what a student made up
        return True
