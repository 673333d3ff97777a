"""What is wrong with settings: problems are collected and told all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.fields import known
from onstream.settings.root import Settings
from onstream.settings.text import shown


@dataclass(frozen=True)
class Problem:
    """One thing to mend. `names` are the settings it concerns, `got` says which value came from
    where.
    """

    names: tuple[str, ...]
    got: str
    expected: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.got}; expected {self.expected}. {self.next_step}"


class SettingsError(UserError):
    """Every problem of the settings at once, one to a line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(
            first.got, expected=first.expected, next_step=first.next_step, exit=Exit.USAGE
        )

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def stated(settings: Settings, names: list[str], expected: str, next_step: str) -> Problem:
    """The problem of the settings `names`, with their values."""
    values = " with ".join(f"{name} = {shown(known()[name].value(settings))}" for name in names)
    return Problem(tuple(names), values, expected, next_step)
