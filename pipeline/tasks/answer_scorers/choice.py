r"""The scorer `choice`: the letter that an answer to a multiple-choice question chooses."""

from __future__ import annotations

import re
from typing import Any

from onstream.pipeline.tasks.answer_scorers.boxed import last_boxed
from onstream.pipeline.tasks.scorers import answer_text

_LETTER = re.compile(r"[\s(\[*]*(?:\\text(?:bf)?\{)?[\s(]*([A-Z])[\s)\]}.:*]*")
_CLAIM = re.compile(
    r"\b(?i:answer|choice|option)(?i:\s+is|\s*[:=])[\s:*_`]*(?i:option\s+|choice\s+)?"
    r"[\s(\[*_`]*([A-Z])(?![\w'’])"
)
_ANOTHER = re.compile(r"[)\]*_`\s]*(?:[,/&+]|\b(?:or|and)\b)\s*[(\[*_`]*[A-Z](?![\w'’])")
_WORD = re.compile(r" +(?!because\b|since\b|as\b)[a-z]")
_LINE = re.compile(r"^[ \t(\[*_`]*([A-Z])(?:[)\]*_`.:]+(?=\s|$)|[ \t]*$)", re.MULTILINE)


def score(completion: str, info: dict[str, Any]) -> dict[str, float]:
    r"""1 where the letter that the answer chooses is `info["answer"]`, else 0.

    The part `answered` is 1 where it chooses one; it is shown, not rewarded.

    >>> score("A cat is none. The answer is (C).", {"answer": "C"})
    {'reward': 1.0, 'answered': 1.0}

    Raises:
        ValueError: `info["answer"]` is no capital letter.
    """
    right_letter = _only_letter(str(info["answer"]))
    if right_letter is None:
        raise ValueError(f"the problem's answer is {info['answer']!r}; expected a capital letter")
    letter = chosen_letter(answer_text(completion))
    return {"reward": float(letter == right_letter), "answered": float(letter is not None)}


def chosen_letter(text: str) -> str | None:
    r"""The one letter in the last `\boxed{…}`; or that of the last "answer is B" or "Answer: B";
    or the one with which lines begin, as in "B" or "B) Paris".

    None where there are several: a list of all letters chooses none.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return _only_letter(boxed)
    for claim in reversed(list(_CLAIM.finditer(text))):
        if claim[1] in "AI" and _WORD.match(text, claim.end()):
            continue  # a word of the sentence: "the answer is a guess"
        return None if _ANOTHER.match(text, claim.end()) else claim[1]
    letters = set(_LINE.findall(text))
    return letters.pop() if len(letters) == 1 else None


def _only_letter(text: str) -> str | None:
    letter = _LETTER.fullmatch(text)
    return letter[1] if letter else None
