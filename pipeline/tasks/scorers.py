"""Scorers, functions `(completion, info) -> float | dict[str, float]`, and what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

Score = float | Mapping[str, float]
Scorer = Callable[[str, dict[str, Any]], Score]

MAX_PARTS = 64


class RolloutError(Exception):
    """Raised by a scorer when the rollout is at fault: the rollout scores 0.

    Any other exception is a failure of the scorer.
    """


class ScoreError(ValueError):
    """A scorer returned something that is not a score."""


def match_answer(completion: str, info: dict[str, Any]) -> dict[str, float]:
    """1 for exactly `info["answer"]`, else 0.

    The part `similarity` is the share of characters in place; it is shown, not rewarded.

    >>> match_answer("maertz", {"answer": "maerts"})
    {'reward': 0.0, 'similarity': 0.8333333333333334}
    """
    given = answer_text(completion)
    answer = str(info["answer"]).strip()
    if given == answer:
        return {"reward": 1.0, "similarity": 1.0}
    same = sum(a == b for a, b in zip(given, answer, strict=False))
    return {"reward": 0.0, "similarity": same / max(len(given), len(answer))}


def answer_text(completion: str) -> str:
    """The answer in a completion: what follows `</think>`, without white space at the ends."""
    return completion.rpartition("</think>")[2].strip()


def read_score(score: object) -> tuple[float, dict[str, float]]:
    """The reward and its parts.

    The reward of a mapping is its part `reward`, or the sum of all parts where there is none.

    >>> read_score({"format": 0.5, "answer": 1.0})
    (1.5, {'format': 0.5, 'answer': 1.0})

    Raises:
        ScoreError: it is neither a finite number nor a mapping of names to finite numbers.
    """
    if not isinstance(score, Mapping):
        return _number(score, "the score"), {}
    if not score or len(score) > MAX_PARTS:
        raise ScoreError(f"the scorer returned {len(score)} parts; expected 1 to {MAX_PARTS}")
    parts = {str(name): _number(value, f"part {name!r}") for name, value in score.items()}
    if "reward" in parts:
        return parts.pop("reward"), parts
    return _number(sum(parts.values()), "the sum of the parts"), parts


def _number(value: object, what: str) -> float:
    # float() takes strings too, but a scorer that returns one has a mistake
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        raise ScoreError(f"{what} is {_short(value)}; expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise ScoreError(f"{what} is {number}; expected a finite number")
    return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
