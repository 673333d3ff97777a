"""Reads the rows of a file or data set as problems, and makes a task of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.answer_scorers import ANSWER_SCORERS, JUDGE
from onstream.pipeline.tasks.base import FiniteTask, Message, Problem
from onstream.pipeline.tasks.teacher_prompt import TeacherPrompt, TeacherPromptError
from onstream.settings.named_teachers import teacher_weights
from onstream.settings.root import Settings
from onstream.settings.route import verification_on

Value = TypeVar("Value")
TEACHER = "teacher"
"""The column that names the teacher of a row, where a run has teachers by name."""


class RowError(ValueError):
    """A row that holds no problem: what it holds, and what was expected."""

    def __init__(self, got: str, *, expected: str) -> None:
        self.got = got
        self.expected = expected
        super().__init__(f"{got}; expected {expected}")

    def at(self, place: str) -> UserError:
        """The error for the user. `place` is the file and line, or the data set and row."""
        return UserError(
            f"{place}: {self.got}", expected=self.expected, next_step="Correct or remove it."
        )


class RowReader:
    """Reads rows with `messages`, or with a prompt field, and an answer.

    With an environment, the scorer `code` or one of the user's own, a problem's `info` is every
    other column. Otherwise it is the answer alone, as text.
    """

    def __init__(self, settings: Settings) -> None:
        task = settings.task
        self._prompt = task.prompt_field
        self._answer = task.answer_field
        judged = task.scorer == JUDGE
        own_scorer = not judged and task.scorer is not None and task.scorer not in ANSWER_SCORERS
        self._whole_row = own_scorer or task.environment is not None
        self._takes_schema = task.scorer == "json-schema"
        self._needs_answer = not (judged or self._whole_row) and verification_on(settings)
        self._system: list[Message] = (
            [{"role": "system", "content": task.system_prompt}] if task.system_prompt else []
        )
        self._teacher_prompt = TeacherPrompt(task.teacher_prompt)
        self._teachers = teacher_weights(settings)

    def problem(self, row: object) -> Problem:
        """The problem in `row`. Raises RowError when there is none."""
        if not isinstance(row, dict):
            raise RowError(
                f"it holds {shown(row)}", expected=f"an object with `messages` or `{self._prompt}`"
            )
        messages = self._messages(row)
        system = [] if messages[0]["role"] == "system" else self._system
        messages = [*system, *messages]
        info = self._info(row)
        try:
            teacher_messages = self._teacher_prompt.messages(messages, {**row, **info})
        except TeacherPromptError as error:
            raise RowError(error.got, expected=error.expected) from error
        return Problem(messages, info, teacher_messages, self._teacher(row))

    def _teacher(self, row: dict[str, Any]) -> str | None:
        """The teacher that `row` names, where there are any by name; None where it names none."""
        if not self._teachers:
            return None
        name = row.get(TEACHER)
        if name is None and any(self._teachers.values()):
            return None
        if name not in self._teachers:
            raise RowError(
                f"`{TEACHER}` is {shown(name)}", expected=f"one of {', '.join(self._teachers)}"
            )
        return str(name)

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        if row.get("messages") is not None:
            return _checked_messages(row["messages"], "messages")
        prompt = row.get(self._prompt)
        if isinstance(prompt, list):
            return _checked_messages(prompt, self._prompt)
        if not isinstance(prompt, str) or not prompt:
            keys = ", ".join(sorted(map(str, row))) or "none"
            raise RowError(
                f"`{self._prompt}` is {shown(prompt)}",
                expected=f"`messages` or a text in `{self._prompt}` (keys here: {keys})",
            )
        return [{"role": "user", "content": prompt}]

    def _info(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._whole_row:
            prompts = ("messages", self._prompt)
            return _encodable({key: value for key, value in row.items() if key not in prompts})
        answer = row.get(self._answer)
        if isinstance(answer, str | int | float) and not isinstance(answer, bool):
            return {"answer": str(answer)}
        if self._takes_schema and isinstance(answer, dict):
            return {"answer": msgspec.json.encode(_encodable(answer)).decode()}
        if self._needs_answer:
            raise RowError(f"`{self._answer}` is {shown(answer)}", expected="a text or a number")
        return {}


def finite_task(
    rows: Sequence[Problem], held_out: Sequence[Problem] | None, settings: Settings, *, name: str
) -> FiniteTask:
    """A task over `rows`. Without `held_out`, the last `eval.samples` rows are held out.

    Raises:
        UserError: nothing is left to train on.
    """
    samples = settings.eval.samples
    seed = settings.run.seed
    if held_out is None:
        cut = max(0, len(rows) - samples)
        held_out = rows[cut:]
        rows = rows[:cut]
    return FiniteTask(rows, held_out[:samples], name=name, seed=seed)


def shown(value: object) -> str:
    """A value as an error message shows it: short."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _checked_messages(messages: object, field: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise RowError(f"`{field}` is {shown(messages)}", expected="a list of at least one message")
    for message in messages:
        if not _is_message(message):
            raise RowError(
                f"`{field}` holds {shown(message)}",
                expected='messages like {"role": "user", "content": "…"}',
            )
    if messages[-1]["role"] == "assistant":
        raise RowError(
            f"`{field}` ends with an assistant message",
            expected="the student's turn to be next (the answer goes to `answer`)",
        )
    return _encodable(messages)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
    )


def _encodable(value: Value) -> Value:
    """`value`, checked to be one that a record can carry."""
    try:
        msgspec.msgpack.encode(value)
    except TypeError as error:
        raise RowError(
            f"it cannot travel in a record ({error})", expected="texts, numbers, lists and objects"
        ) from error
    return value
