"""What `onstream replay` prints: text, tables on a terminal, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.text import Text

from onstream.workers.inspection.tables import add_row, plain_table
from onstream.workers.replay.result import (
    FIGURES,
    TEXT_SHOWN,
    figure_text,
    recorded_text,
    step_text,
    worst_rows,
)

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep

Say = Callable[[str], None]


class ReplayOutput:
    """Says everything in sentences and lines of text."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def step(self, step: ReplayedStep, worst: int, run: str, *, compared: bool) -> None:
        """Show the last step, with its `worst` samples and, where `compared`, what differs."""
        self.say(step_text(step, worst, run, compared=compared))

    def result(self, data: dict[str, Any]) -> None:
        """Print the result as `data`; text has said it already."""


class TableOutput(ReplayOutput):
    """Shows the last step in tables."""

    def __init__(self, console: Console) -> None:
        super().__init__(lambda sentence: console.print(Text(sentence), soft_wrap=True))
        self._console = console

    def step(self, step: ReplayedStep, worst: int, run: str, *, compared: bool) -> None:
        """Show the last step."""
        recorded = step.recorded.metrics if step.recorded and compared else {}
        table = plain_table(f"step {step.number}", "replayed", "recorded where other")
        for name, value in step.row.items():
            if value is not None and name != "step":
                text = recorded_text(recorded, name, value)
                add_row(table, name, figure_text(value), text)
        self._console.print(table)
        self._worst(worst_rows(step, worst, run))

    def _worst(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        self.say("the samples with the largest part in its loss:")
        table = plain_table("rollout", *FIGURES, "completion")
        for row in rows:
            figures = [figure_text(row[name]) for name in FIGURES]
            text = " / ".join(repr(text[:TEXT_SHOWN]) for text in row["completions"])
            add_row(table, row["uid"], *figures, text)
        self._console.print(table)


class JsonOutput(ReplayOutput):
    """Prints one JSON object at the end, and says the rest on standard error."""

    def __init__(self) -> None:
        super().__init__(lambda sentence: click.echo(sentence, err=True))

    def step(self, step: ReplayedStep, worst: int, run: str, *, compared: bool) -> None:
        """Nothing: the step is in the result."""

    def result(self, data: dict[str, Any]) -> None:
        """Print the result."""
        click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2))


def output_of(as_json: bool) -> ReplayOutput:
    """The output that was asked for: text where standard output is no terminal."""
    if as_json:
        return JsonOutput()
    return TableOutput(Console()) if sys.stdout.isatty() else ReplayOutput(click.echo)
