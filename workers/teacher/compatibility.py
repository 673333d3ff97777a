"""Whether a teacher can judge a student's tokens at all: same vocabulary, same turns, enough
context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onstream.pipeline.errors import UserError

TURNS = [
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2"},
]
_CHOOSE = "Choose a teacher of the student's family with teacher_inference.model.name, or another student with model.name."


@dataclass(frozen=True)
class ModelInfo:
    """A model as the comparison sees it: its tokenizer, the ids that end its turns, its context,
    and the width of its output.
    """

    name: str
    tokenizer: Any
    end_ids: frozenset[int]
    context_tokens: int
    vocabulary_size: int


def check(student: ModelInfo, teacher: ModelInfo, max_completion: int) -> None:
    """Refuses a teacher whose judgement of the student's tokens would mean nothing.

    Raises:
        UserError: the vocabularies, the chat templates or the ends of turn differ, or the teacher's
            context cannot hold what the student may write, a prompt and a completion of
            `max_completion` tokens.
    """
    _check_vocabulary(student, teacher)
    _check_template(student, teacher)
    _check_end(student, teacher)
    _check_context(student, teacher, max_completion)


def first_difference(student: dict[str, int], teacher: dict[str, int]) -> str | None:
    """The first id whose token differs, in words; None for equal vocabularies (token -> id)."""
    if student == teacher:
        return None
    ours, theirs = (
        {number: token for token, number in vocabulary.items()} for vocabulary in (student, teacher)
    )
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) != theirs.get(number):
            return f"id {number} is {_entry(ours.get(number))} to the student and {_entry(theirs.get(number))} to the teacher"
    return "several tokens share one id"


def _entry(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def _check_vocabulary(student: ModelInfo, teacher: ModelInfo) -> None:
    ours = student.tokenizer.get_vocab()
    theirs = teacher.tokenizer.get_vocab()
    difference = first_difference(ours, theirs)
    if difference:
        raise UserError(
            f"the vocabulary of the teacher {teacher.name!r} ({len(theirs)} entries) is not the student's "
            f"({student.name!r}, {len(ours)} entries): {difference}",
            expected="the same token for every id, since the teacher judges the student's token ids",
            next_step=_CHOOSE,
        )


def _check_template(student: ModelInfo, teacher: ModelInfo) -> None:
    ours, theirs = (
        party.tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
        for party in (student, teacher)
    )
    if ours != theirs:
        raise UserError(
            f"the teacher {teacher.name!r} writes a conversation as {_clipped(theirs)}, the student {student.name!r} as {_clipped(ours)}",
            expected="chat templates that render alike, since the teacher sees the student's prompts",
            next_step=f"Save the teacher's chat template with the student's tokenizer. {_CHOOSE}",
        )


def _clipped(text: str, limit: int = 160) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _check_end(student: ModelInfo, teacher: ModelInfo) -> None:
    ours = student.tokenizer.eos_token_id
    if ours not in teacher.end_ids:
        raise UserError(
            f"the student {student.name!r} ends its turn with token {ours}, the teacher {teacher.name!r} with {sorted(teacher.end_ids)}",
            expected="one end-of-turn token; with two, the teacher teaches the student never to stop",
            next_step="Set the student's eos_token to the teacher's, or choose another teacher.",
        )


def _check_context(student: ModelInfo, teacher: ModelInfo, max_completion: int) -> None:
    if teacher.context_tokens < student.context_tokens and teacher.context_tokens <= max_completion:
        raise UserError(
            f"the context of the teacher {teacher.name!r} is {teacher.context_tokens} tokens",
            expected=f"more than inference.sampling.max_completion = {max_completion}: it must hold the prompt and the completion",
            next_step="Lower inference.sampling.max_completion, or choose a teacher with a longer context.",
        )
