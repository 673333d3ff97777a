"""Whether a teacher can score a student's tokens: vocabulary, chat template, context.

It is read from tokenizers and configurations alone. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.tokenizer import (
    load_configs,
    load_tokenizer,
    warn_of_unread_arguments,
)
from onstream.settings.chat_templates import TEACHER_ARGUMENTS, arguments_of
from onstream.settings.root import Settings

CONVERSATION = [
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2"},
]
"""What both chat templates render, to be compared."""
SHOWN_CHARACTERS = 160
_CHOOSE_ANOTHER = (
    "Choose a teacher of the student's family with teacher_inference.model.name, "
    "or another student with model.name."
)


@dataclass(frozen=True)
class ModelInfo:
    """A student or a teacher, as the two are compared.

    `end_ids` are the ids that end its turns, and `vocabulary_size` is the width of its output.
    `template_arguments` are the variables that its chat template is rendered with.
    """

    name: str
    tokenizer: Any
    end_ids: frozenset[int]
    context_tokens: int
    vocabulary_size: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def load_student(settings: Settings) -> ModelInfo:
    """The student.

    Raises:
        UserError: it has no usable tokenizer.
    """
    return _load(settings.model.name, settings.model.chat_template_kwargs)


def load_teacher(settings: Settings) -> ModelInfo:
    """The teacher beside the run; where none is named, the student's starting model.

    Raises:
        UserError: it has no usable tokenizer.
    """
    model = settings.teacher_inference.model
    arguments = arguments_of(model, settings)
    info = _load(model.name or settings.model.name, arguments)
    if model.chat_template_kwargs is not None:
        warn_of_unread_arguments(TEACHER_ARGUMENTS[0], info.tokenizer, arguments)
    return info


def _load(name: str, template_arguments: Mapping[str, Any]) -> ModelInfo:
    """The model `name`, a directory or a name of the hub.

    Raises:
        UserError: it has no usable tokenizer.
    """
    tokenizer = load_tokenizer(name)
    config, _ = load_configs(name)
    text = config.get_text_config()
    return ModelInfo(
        name,
        tokenizer,
        _end_ids(tokenizer, config),
        int(text.max_position_embeddings),
        int(text.vocab_size),
        template_arguments,
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> frozenset[int]:
    """Every token that ends a turn, by the tokenizer or by the configuration."""
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None)


def check_compatible(student: ModelInfo, teacher: ModelInfo, max_completion: int) -> None:
    """Refuse a teacher whose scores of the student's tokens would mean nothing.

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
    """The first id whose token differs; None for equal vocabularies (token -> id)."""
    if student == teacher:
        return None
    ours = {number: token for token, number in student.items()}
    theirs = {number: token for token, number in teacher.items()}
    for number in sorted(ours.keys() | theirs.keys()):
        our_token = ours.get(number)
        their_token = theirs.get(number)
        if our_token != their_token:
            return (
                f"id {number} is {_shown(our_token)} to the student "
                f"and {_shown(their_token)} to the teacher"
            )
    return "several tokens share one id"


def _shown(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def _check_vocabulary(student: ModelInfo, teacher: ModelInfo) -> None:
    ours = student.tokenizer.get_vocab()
    theirs = teacher.tokenizer.get_vocab()
    difference = first_difference(ours, theirs)
    if difference:
        raise UserError(
            f"the vocabulary of the teacher {teacher.name!r} ({len(theirs)} entries) is not the "
            f"student's ({student.name!r}, {len(ours)} entries): {difference}",
            expected="the same token for every id, since the teacher scores the student's ids",
            next_step=_CHOOSE_ANOTHER,
        )


def _check_template(student: ModelInfo, teacher: ModelInfo) -> None:
    ours = _rendered(student)
    theirs = _rendered(teacher)
    if ours != theirs:
        raise UserError(
            f"the teacher {teacher.name!r} writes a conversation as {_clipped(theirs)}, "
            f"the student {student.name!r} as {_clipped(ours)}",
            expected="chat templates that render alike, since the teacher gets the student's "
            "prompts",
            next_step="Save the teacher's chat template with the student's tokenizer, or give both "
            "the variables with which they agree (model.chat_template_kwargs, "
            f"{TEACHER_ARGUMENTS[0]}). {_CHOOSE_ANOTHER}",
        )


def _rendered(model: ModelInfo) -> str:
    text: str = model.tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True, **model.template_arguments
    )
    return text


def _clipped(text: str) -> str:
    if len(text) > SHOWN_CHARACTERS:
        text = text[:SHOWN_CHARACTERS] + "…"
    return repr(text)


def _check_end(student: ModelInfo, teacher: ModelInfo) -> None:
    ours = student.tokenizer.eos_token_id
    if ours not in teacher.end_ids:
        raise UserError(
            f"the student {student.name!r} ends its turn with token {ours}, "
            f"the teacher {teacher.name!r} with {sorted(teacher.end_ids)}",
            expected="one end-of-turn token; with two, the teacher teaches the student never to "
            "stop",
            next_step="Set the student's eos_token to the teacher's, or choose another teacher.",
        )


def _check_context(student: ModelInfo, teacher: ModelInfo, max_completion: int) -> None:
    if teacher.context_tokens < student.context_tokens and teacher.context_tokens <= max_completion:
        raise UserError(
            f"the context of the teacher {teacher.name!r} is {teacher.context_tokens} tokens",
            expected=f"more than inference.sampling.max_completion = {max_completion}: it must "
            "hold the prompt and the completion",
            next_step="Lower inference.sampling.max_completion, or choose a teacher with a longer "
            "context.",
        )
