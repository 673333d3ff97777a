"""Tasks whose questions are drawn at random, and the built-in ones, which tiny models learn.

A new one is a function that draws problems, and a line in `BUILTIN`. EXTENDING.md has an example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import islice
from random import Random
from string import ascii_lowercase
from typing import Annotated, Any, Literal

import msgspec

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import Draw, Message, Problem, Question
from onstream.pipeline.tasks.colour_words import PictureArgs, colour_words
from onstream.pipeline.tasks.teacher_prompt import TeacherPrompt, TeacherPromptError

HELD_OUT_SHARE = 1 / 4
"""The share of a procedural task's questions that is held out. It is large so that narrow tasks
keep some too, and so that finding one takes about four draws, which are slow in reasoning-gym.
"""
MAX_DRAWS = 4096
"""Draws in search of one problem. A task that gives none after so many is too narrow."""


class ProceduralTask:
    """Problems drawn at random from a space too large to list.

    A hash of the question alone decides what is held out. So a model that was trained under one
    seed has not seen what a run under another seed evaluates on.
    """

    def __init__(
        self,
        draw: Draw,
        *,
        name: str,
        seed: int,
        samples: int,
        system_prompt: str | None,
        teacher_prompt: TeacherPrompt,
    ) -> None:
        """Raises UserError when nothing that `draw` makes may be trained on."""
        self._draw = draw
        self._name = name
        self._seed = seed
        self._samples = samples
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._teacher_prompt = teacher_prompt
        self.train(0)

    @property
    def held_out_size(self) -> int:
        return len(self._held_out)

    def train(self, index: int) -> Problem:
        random = Random(f"{self._seed}/train/{index}")
        for question, info in islice(iter(lambda: self._draw(random), None), MAX_DRAWS):
            if not is_held_out(question):
                return self._problem(question, info)
        raise self._too_narrow("no problem to train on")

    def held_out(self, index: int) -> Problem:
        return self._held_out[index]

    @cached_property
    def _held_out(self) -> list[Problem]:
        """The first `samples` different held-out questions.

        They are made at their first use, since only evaluations need them.
        """
        random = Random("held-out")
        found = dict[bytes, Problem]()
        misses = 0
        while len(found) < self._samples and misses < MAX_DRAWS:
            question, info = self._draw(random)
            content = _bytes(question)
            new = is_held_out(question) and content not in found
            misses = 0 if new else misses + 1
            if new:
                found[content] = self._problem(question, info)
        if self._samples and not found:
            raise self._too_narrow("no problem to hold out")
        return list(found.values())

    def _problem(self, question: Question, info: dict[str, Any]) -> Problem:
        messages: list[Message] = [*self._system, {"role": "user", "content": question}]
        try:
            return Problem(messages, info, self._teacher_prompt.messages(messages, info))
        except TeacherPromptError as error:
            raise UserError(
                f"task {self._name}: {error.got}",
                expected=error.expected,
                next_step="Correct `task.teacher_prompt`.",
            ) from error

    def _too_narrow(self, what: str) -> UserError:
        return UserError(
            f"task {self._name} gave {what} in {MAX_DRAWS} draws",
            expected="more different problems",
            next_step="Widen `task.args`.",
        )


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
    """Sums and differences of `terms` integers from 0 to `max_value`."""

    max_value: Annotated[int, msgspec.Meta(ge=1, le=10**12)] = 99
    operations: Annotated[tuple[Literal["+", "-"], ...], msgspec.Meta(min_length=1)] = ("+", "-")
    terms: Annotated[int, msgspec.Meta(ge=2, le=100)] = 2


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
        answer = random.randint(0, args.max_value)
        expression = str(answer)
        for _ in range(args.terms - 1):
            term = random.randint(0, args.max_value)
            operation = random.choice(args.operations)
            answer = answer + term if operation == "+" else answer - term
            expression += f"{operation}{term}"
        return f"Compute: {expression}", {"answer": str(answer)}

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


def is_held_out(question: Question) -> bool:
    """Whether a procedural task holds out `question`, which its content alone decides."""
    digest = hashlib.blake2b(_bytes(question), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**64


def _bytes(question: Question) -> bytes:
    if isinstance(question, str):
        return question.encode()
    return msgspec.json.encode(question, order="deterministic")
