r"""The scorer `number`: the final number of an answer, as in GSM8K."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from onstream.pipeline.tasks.answer_scorers.boxed import last_boxed
from onstream.pipeline.tasks.scorers import answer_text

_MARK = "####"
_SIZE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.%])[-+−]\$?)?"  # a sign behind something else is a minus between two
    r"(?<![\w.^/])(?<!\^\{)(?<![\w)]\*\*)"  # neither the rest of a word, nor an exponent
    rf"(?>(?P<size>{_SIZE})(?:[eE](?P<exponent>[-+]?[0-9]+))?"
    rf"(?:/(?P<divisor>{_SIZE}))?)"
    r"(?!\^|\*\*[\w(])"  # nor what has an exponent
)
_MAX_EXPONENT = 999


def score(completion: str, info: dict[str, Any]) -> dict[str, float]:
    r"""1 where the final number is that of `info["answer"]`, else 0.

    Units, currency, `%` and thousands separators do not count. The part `answered` is 1 where there
    is a final number; it is shown, not rewarded.

    >>> score("They have 1,200 + 34 apples.\n#### 1,234 apples", {"answer": "1234"})
    {'reward': 1.0, 'answered': 1.0}

    Raises:
        ValueError: `info["answer"]` has no final number.
    """
    answer = str(info["answer"])
    right_number = final_number(answer)
    if right_number is None:
        raise ValueError(f"the problem's answer is {answer!r}; expected one with a number")
    number = final_number(answer_text(completion))
    return {"reward": float(number == right_number), "answered": float(number is not None)}


def final_number(text: str) -> Fraction | None:
    r"""The number in the line behind the last `####`, or else in the last `\boxed{…}`.

    There it must be the only one. A text with neither has its last number.
    """
    marked = _marked(text)
    numbers = list(_NUMBER.finditer(text if marked is None else marked))
    if not numbers or (marked is not None and len(numbers) > 1):
        return None
    return _value(numbers[-1])


def _marked(text: str) -> str | None:
    if _MARK in text:
        return text.rpartition(_MARK)[2].strip().partition("\n")[0]
    boxed = last_boxed(text)
    return None if boxed is None else boxed.replace("{,}", ",").replace("\\,", "")


def _value(number: re.Match[str]) -> Fraction | None:
    exponent = number["exponent"] or "0"
    if len(exponent) > 4 or abs(int(exponent)) > _MAX_EXPONENT:
        return None
    try:
        value = Fraction(number["size"].replace(",", "")) * Fraction(10) ** int(exponent)
        value /= Fraction((number["divisor"] or "1").replace(",", ""))
    except (ValueError, ZeroDivisionError):  # more digits than Python reads; a division by zero
        return None
    return -value if (number["sign"] or "")[:1] in ("-", "−") else value
