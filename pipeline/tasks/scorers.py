"""Scorers: functions `(completion, info) -> float | dict[str, float]`, and what their result means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

Score = float | Mapping[str, float]
Scorer = Callable[[str, dict[str, Any]], Score]

MAX_PARTS = 64


class RolloutError(Exception):
    """A scorer raises it for what the rollout did wrong: the rollout scores 0. Any other exception
    is the scorer's own failure.
    """


class ScoreError(ValueError):
    """A scorer returned something that is no score."""


def match_answer(completion: str, info: dict[str, Any]) -> dict[str, float]:
    """1 for exactly `info["answer"]`, else 0; `similarity`, the share of characters in place, is
    shown but not rewarded.

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
    """The answer in a completion: what follows its reasoning (`</think>`), without the space around
    it.
    """
    return completion.rpartition("</think>")[2].strip()


def read_score(score: object) -> tuple[float, dict[str, float]]:
    """The reward and its parts. Of a mapping, the reward is `reward` if it has one, else the sum of
    the parts.

    >>> read_score({"format": 0.5, "answer": 1.0})
    (1.5, {'format': 0.5, 'answer': 1.0})

    Raises:
        ScoreError: not a finite number, nor a mapping of names to finite numbers.
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
    # float() takes strings too, but a scorer that returns one is mistaken
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        raise ScoreError(f"{what} is {_short(value)}; expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise ScoreError(f"{what} is {number}; expected a finite number")
    return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
