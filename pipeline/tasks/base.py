"""What a task is: problems by index, in an order given by the seed, and held-out problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import msgspec

from onstream.pipeline.errors import UserError

Message = dict[str, Any]
Question = str | list[dict[str, Any]]
"""A message's content: a text, or a list of parts, some of them images."""
Draw = Callable[[Random], tuple[Question, dict[str, Any]]]
"""Makes one question, and what its scorer gets."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    The scorer gets `info` beside the completion; `info["answer"]` is the right answer where there
    is one. `teacher_messages` are what a teacher reads in place of `messages`, by
    `task.teacher_prompt`; None where it reads the same. `teacher` is the name of the one that shall
    score it; None where it names none.
    """

    messages: list[Message]
    info: dict[str, Any] = field(default_factory=dict)
    teacher_messages: list[Message] | None = None
    teacher: str | None = None


class Task(Protocol):
    """Problems by index.

    The same settings give the same problems in every process, so records carry the index alone.
    """

    @property
    def held_out_size(self) -> int:
        """How many held-out problems there are: `eval.samples`, or all where the task has fewer."""
        ...

    def train(self, index: int) -> Problem:
        """The problem to train on at any `index` ≥ 0. Finite data starts over, reshuffled."""
        ...

    def held_out(self, index: int) -> Problem:
        """The held-out problem at 0 ≤ `index` < `held_out_size`, the same for every `run.seed`."""
        ...


@dataclass(frozen=True)
class Repeats:
    """How many of `rows` are asked elsewhere too.

    `held_out` ask exactly what a held-out problem asks, and are not trained on; `nearly_held_out`
    do so but for case and white space, and are; `earlier` ask exactly what a row before them asks.
    """

    rows: int
    held_out: int
    nearly_held_out: int
    earlier: int


class FiniteTask:
    """Problems from a list, reshuffled each epoch.

    In place of a row that asks the same as a held-out one, the next row is taken.
    """

    def __init__(
        self, rows: Sequence[Problem], held_out: Sequence[Problem], *, name: str, seed: int
    ) -> None:
        """Raises UserError when no row is left to train on."""
        self._rows = rows
        self._held_out = held_out
        self._name = name
        self._seed = seed
        self._held_out_contents = {_content(problem) for problem in held_out}
        self._epoch: tuple[int, list[int]] = (-1, [])
        self.train(0)

    @property
    def held_out_size(self) -> int:
        return len(self._held_out)

    @property
    def size(self) -> int:
        """How many rows there are besides the held-out ones."""
        return len(self._rows)

    def repeats(self) -> Repeats:
        """Read every row, and count those that are asked elsewhere too."""
        nearly_held_out = {_words(problem) for problem in self._held_out}
        seen = set[bytes]()
        held_out = nearly = earlier = 0
        for problem in self._rows:
            content = _content(problem)
            if content in self._held_out_contents:
                held_out += 1
            elif _words(problem) in nearly_held_out:
                nearly += 1
            earlier += content in seen
            seen.add(content)
        return Repeats(self.size, held_out, nearly, earlier)

    def train(self, index: int) -> Problem:
        size = len(self._rows)
        epoch, place = divmod(index, max(1, size))
        order = self._order(epoch)
        for step in range(size):
            problem = self._rows[order[(place + step) % size]]
            if _content(problem) not in self._held_out_contents:
                return problem
        raise UserError(
            f"{self._name} has {size} problems besides the held-out ones, and none to train on",
            expected="at least one that asks something else than the held-out problems",
            next_step="Add problems, or lower `eval.samples`.",
        )

    def held_out(self, index: int) -> Problem:
        return self._held_out[index]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            order = list(range(len(self._rows)))
            Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1]


def _content(problem: Problem) -> bytes:
    """A digest of the problem's messages without the system prompt: equal for equal problems."""
    encoded = msgspec.json.encode(_asked(problem), order="deterministic")
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _words(problem: Problem) -> bytes:
    """A digest as `_content`, and equal too for problems that differ in case or white space."""
    text = " ".join(str(message["content"]) for message in _asked(problem))
    words = " ".join(text.casefold().split())
    return hashlib.blake2b(words.encode(errors="replace"), digest_size=16).digest()


def _asked(problem: Problem) -> list[Message]:
    return [message for message in problem.messages if message["role"] != "system"]
