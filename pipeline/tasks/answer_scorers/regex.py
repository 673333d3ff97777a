"""The scorer `regex`: whether a regular expression matches an answer."""

from __future__ import annotations

import re
from typing import Any

from onstream.pipeline.tasks.scorers import answer_text


def score(completion: str, info: dict[str, Any]) -> float:
    r"""1 where the regular expression `info["answer"]` matches the answer as a whole, else 0.

    >>> score("<think>4 + 2</think> 42 km", {"answer": r"42( km)?"})
    1.0

    Raises:
        ValueError: `info["answer"]` is no regular expression.
    """
    try:
        pattern = re.compile(str(info["answer"]))
    except re.error as error:
        raise ValueError(f"the problem's answer is no regular expression: {error}") from error
    return float(pattern.fullmatch(answer_text(completion)) is not None)
