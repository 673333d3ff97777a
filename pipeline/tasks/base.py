"""What a task is: problems by index, in an order given by the seed, and held-out problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from random import Random
from typing import Any, Protocol

import msgspec

from onstream.pipeline.errors import UserError

Message = dict[str, Any]
Question = str | list[dict[str, Any]]
"""A message's content: a text, or a list of parts, some of them images."""
Draw = Callable[[Random], tuple[Question, dict[str, Any]]]
"""Makes one question, and what its scorer gets."""

HELD_OUT_SHARE = 1 / 4
"""The share of a procedural task's questions that is held out. It is large so that narrow tasks
keep some too, and so that finding one takes about four draws, which are slow in reasoning-gym.
"""
MAX_DRAWS = 4096
"""Draws in search of one problem. A task that gives none after so many is too narrow."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    The scorer gets `info` beside the completion; `info["answer"]` is the right answer where there
    is one.
    """

    messages: list[Message]
    info: dict[str, Any] = field(default_factory=dict)


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


class ProceduralTask:
    """Problems drawn at random from a space too large to list.

    A hash of the question alone decides what is held out. So a model that was trained under one
    seed has not seen what a run under another seed evaluates on.
    """

    def __init__(
        self, draw: Draw, *, name: str, seed: int, samples: int, system_prompt: str | None
    ) -> None:
        """Raises UserError when nothing that `draw` makes may be trained on."""
        self._draw = draw
        self._name = name
        self._seed = seed
        self._samples = samples
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
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
        return Problem([*self._system, {"role": "user", "content": question}], info)

    def _too_narrow(self, what: str) -> UserError:
        return UserError(
            f"task {self._name} gave {what} in {MAX_DRAWS} draws",
            expected="more different problems",
            next_step="Widen `task.args`.",
        )


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


def is_held_out(question: Question) -> bool:
    """Whether a procedural task holds out `question`, which its content alone decides."""
    digest = hashlib.blake2b(_bytes(question), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**64


def _bytes(question: Question) -> bytes:
    if isinstance(question, str):
        return question.encode()
    return msgspec.json.encode(question, order="deterministic")


def _content(problem: Problem) -> bytes:
    """A digest of the problem's messages without the system prompt: equal for equal problems."""
    messages = [message for message in problem.messages if message["role"] != "system"]
    encoded = msgspec.json.encode(messages, order="deterministic")
    return hashlib.blake2b(encoded, digest_size=16).digest()
