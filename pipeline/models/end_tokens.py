"""The tokens at which a model's turns end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.chat_template import ANSWER, ANSWERED_CHAT


def end_token_ids(tokenizer: Any, end_tokens: Sequence[str]) -> list[int]:
    """The ids of the tokens that `model.end_tokens` names, in its order.

    Raises:
        UserError: one is no token of this tokenizer.
    """
    found = []
    for text in end_tokens:
        token = _id_of(tokenizer, text)
        if token is None:
            raise UserError(
                f"model.end_tokens has {text!r}, which is no token of {tokenizer.name_or_path}",
                expected="texts that are one token each in the student's vocabulary",
                next_step="Correct it; tokenizer_config.json lists the special tokens.",
            )
        found.append(token)
    return found


def _id_of(tokenizer: Any, text: str) -> int | None:
    token = tokenizer.convert_tokens_to_ids(text)
    if token is not None and token != tokenizer.unk_token_id:
        return int(token)
    # A token of bytes has another name in the vocabulary than its text.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        return None
    return int(ids[0])


def stop_ids(
    tokenizer: Any, config: Any, generation_config: Any, end_tokens: Sequence[str] = ()
) -> set[int]:
    """Every token that ends a turn: by the tokenizer, either configuration, or `end_tokens`.

    A placeholder of images ends a turn too: there is no image to continue with. As the last token
    it is predicted, and never read.

    Raises:
        UserError: one of `end_tokens` is no token.
    """
    placeholders = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return {
        *_listed(tokenizer.eos_token_id),
        *_configured(config, generation_config),
        *end_token_ids(tokenizer, end_tokens),
        *(token for value in placeholders for token in _listed(value)),
    }


def add_stops(model: Any, ids: Sequence[int]) -> None:
    """Name `ids` first among the tokens at which generation by `model`'s files ends."""
    named = _configured(model.config, model.generation_config)
    if not set(ids) <= set(named):
        model.generation_config.eos_token_id = list(dict.fromkeys([*ids, *named]))


def ends_of_template(tokenizer: Any, template_arguments: Any) -> list[int]:
    """The special tokens that the chat template writes after the last answer, in their order.

    None where it renders no answer, or puts none there.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            ANSWERED_CHAT, tokenize=False, **template_arguments
        )
    except Exception:  # templates raise anything: jinja's errors, TypeError, …
        return []
    _, answer, tail = text.rpartition(ANSWER)
    if not answer:
        return []
    special = set(tokenizer.all_special_ids)
    special |= {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return [token for token in ids if token in special]


def require_template_end(
    name: str, tokenizer: Any, template_arguments: Any, stops: Collection[int]
) -> None:
    """Check that the student `name` stops where its chat template ends an answer.

    Raises:
        UserError: the template writes special tokens after an answer, and none is among `stops`.
    """
    ends = ends_of_template(tokenizer, template_arguments)
    if ends and not set(ends) & set(stops):
        raise never_stops(name, tokenizer, ends[0], stops)


def never_stops(name: str, tokenizer: Any, end: int, stops: Collection[int]) -> UserError:
    """That the student `name` stops at `stops` alone, and is taught to end with `end`."""
    token = tokenizer.convert_ids_to_tokens(end)
    return UserError(
        f"the chat template ends an answer with {token!r} (token {end}), where the student "
        f"{name!r} does not stop: it stops at {sorted(stops)}",
        expected="a student that stops where the teacher teaches it to end",
        next_step=end_advice(token),
    )


def end_advice(token: str) -> str:
    """How a student learns to end with `token`."""
    return (
        f'Set model.end_tokens = ["{token}"]: then the student stops there, and learns to '
        "(docs/teachers.md has the recipe of a base student)."
    )


def _configured(config: Any, generation_config: Any) -> list[int]:
    text = _listed(config.get_text_config().eos_token_id)
    return [*text, *_listed(getattr(generation_config, "eos_token_id", None))]


def _listed(value: Any) -> list[int]:
    """`value` as a list: a configuration may name several tokens, one, or none."""
    tokens = value if isinstance(value, list) else [value]
    return [int(token) for token in tokens if token is not None]
