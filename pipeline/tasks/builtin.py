"""The table of built-in tasks, and those of words and numbers, which tiny models learn in minutes.

A new one is a function that draws problems, and a line in `BUILTIN`. EXTENDING.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from string import ascii_lowercase
from typing import Annotated, Any, Literal

import msgspec

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import Draw
from onstream.pipeline.tasks.colour_words import PictureArgs, colour_words


class WordArgs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Words of `min_length` to `max_length` lowercase letters, every length equally often."""

    min_length: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    max_length: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 10

    def __post_init__(self) -> None:
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length {self.min_length} is more than max_length {self.max_length}"
            )


class ArithmeticArgs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Sums and differences of two integers from 0 to `max_value`."""

    max_value: Annotated[int, msgspec.Meta(ge=1, le=10**12)] = 99
    operations: Annotated[tuple[Literal["+", "-"], ...], msgspec.Meta(min_length=1)] = ("+", "-")


def reverse_text(args: WordArgs) -> Draw:
    """`Reverse: stream` → `maerts`."""

    def draw(random: Random) -> tuple[str, dict[str, Any]]:
        word = _word(random, args)
        return f"Reverse: {word}", {"answer": word[::-1]}

    return draw


def alphabet_sort(args: WordArgs) -> Draw:
    """`Sort: stream` → `aemrst`."""

    def draw(random: Random) -> tuple[str, dict[str, Any]]:
        word = _word(random, args)
        return f"Sort: {word}", {"answer": "".join(sorted(word))}

    return draw


def arithmetic(args: ArithmeticArgs) -> Draw:
    """`Compute: 12-34` → `-22`."""

    def draw(random: Random) -> tuple[str, dict[str, Any]]:
        left = random.randint(0, args.max_value)
        right = random.randint(0, args.max_value)
        operation = random.choice(args.operations)
        answer = left + right if operation == "+" else left - right
        return f"Compute: {left}{operation}{right}", {"answer": str(answer)}

    return draw


BUILTIN: Mapping[str, tuple[type[msgspec.Struct], Callable[[Any], Draw]]] = {
    "reverse-text": (WordArgs, reverse_text),
    "alphabet-sort": (WordArgs, alphabet_sort),
    "arithmetic": (ArithmeticArgs, arithmetic),
    "colour-words": (PictureArgs, colour_words),
}
"""By `task.name`: the type of `task.args`, and what makes the draw of it. Their scorer is
`match_answer`.
"""


def builtin_draw(name: str, args: dict[str, Any]) -> Draw:
    """What draws the problems of the built-in task `name`.

    Raises:
        UserError: the task has no such argument, or a value is out of bounds.
    """
    kind, make = BUILTIN[name]
    try:
        return make(msgspec.convert(args, kind))
    except msgspec.ValidationError as error:
        known = ", ".join(
            f"{field.name} (default {field.default!r})" for field in msgspec.structs.fields(kind)
        )
        raise UserError(
            f"`task.args` = {args} of {name}: {error}",
            expected=f"among {known}",
            next_step="Correct `task.args`; docs/tasks.md has each task's arguments.",
        ) from error


def _word(random: Random, args: WordArgs) -> str:
    length = random.randint(args.min_length, args.max_length)
    return "".join(random.choices(ascii_lowercase, k=length))
