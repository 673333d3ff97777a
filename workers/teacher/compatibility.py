"""Whether a teacher can score a student's tokens: vocabulary, chat template, context.

It is read from tokenizers and configurations alone. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.end_tokens import (
    end_advice,
    ends_of_template,
    never_stops,
    require_template_end,
    stop_ids,
)
from onstream.pipeline.models.tokenizer import (
    load_configs,
    load_student_tokenizer,
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
    name = settings.model.name
    tokenizer = load_student_tokenizer(name, settings.model)
    config, generation = load_configs(name)
    ends = stop_ids(tokenizer, config, generation, settings.model.end_tokens)
    return _info(name, tokenizer, config, frozenset(ends), settings.model.chat_template_kwargs)


def load_teacher(settings: Settings) -> ModelInfo:
    """The teacher beside the run; where none is named, the student's starting model.

    Raises:
        UserError: it has no usable tokenizer.
    """
    model = settings.teacher_inference.model
    arguments = arguments_of(model, settings)
    name = model.name or settings.model.name
    own = name != settings.model.name
    tokenizer = load_tokenizer(name) if own else load_student_tokenizer(name, settings.model)
    config, generation = load_configs(name)
    ends = _end_ids(tokenizer, config)
    ends |= set(ends_of_template(tokenizer, arguments)) & stop_ids(tokenizer, config, generation)
    info = _info(name, tokenizer, config, ends, arguments)
    if model.chat_template_kwargs is not None:
        warn_of_unread_arguments(TEACHER_ARGUMENTS[0], info.tokenizer, arguments)
    return info


def _info(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    end_ids: frozenset[int],
    template_arguments: Mapping[str, Any],
) -> ModelInfo:
    text = config.get_text_config()
    return ModelInfo(
        name,
        tokenizer,
        end_ids,
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
    # Before the templates, which may write the end of a turn by the tokenizer's name for it.
    _check_end(student, teacher)
    _check_template(student, teacher)
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
            next_step=f"{end_advice(_end_of(teacher))} Or choose another teacher.",
        )
    taught = [token for token in _template_ends(teacher) if token in teacher.end_ids]
    if taught and not student.end_ids.intersection(taught):
        raise never_stops(student.name, student.tokenizer, taught[0], student.end_ids)


def check_own_end(student: ModelInfo) -> None:
    """Refuse a student that its own chat template ends otherwise than it stops.

    For a teacher whose own ends are not known: it renders conversations as the student does.

    Raises:
        UserError: the template writes special tokens after an answer, and the student stops at none
            of them.
    """
    require_template_end(
        student.name, student.tokenizer, student.template_arguments, student.end_ids
    )


def _template_ends(model: ModelInfo) -> list[int]:
    return ends_of_template(model.tokenizer, model.template_arguments)


def _end_of(teacher: ModelInfo) -> str:
    """The token that the teacher ends its turns with."""
    by_template = [token for token in _template_ends(teacher) if token in teacher.end_ids]
    end = (by_template or [teacher.tokenizer.eos_token_id])[0]
    token: str = teacher.tokenizer.convert_ids_to_tokens(end)
    return token


def _check_context(student: ModelInfo, teacher: ModelInfo, max_completion: int) -> None:
    if teacher.context_tokens < student.context_tokens and teacher.context_tokens <= max_completion:
        raise UserError(
            f"the context of the teacher {teacher.name!r} is {teacher.context_tokens} tokens",
            expected=f"more than inference.sampling.max_completion = {max_completion}: it must "
            "hold the prompt and the completion",
            next_step="Lower inference.sampling.max_completion, or choose a teacher with a longer "
            "context.",
        )
