"""`onstream eval`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import (
    prints_json,
    unless_terminal_option,
    version_option,
    with_run_settings,
)

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command("eval")
@with_run_settings
@version_option
@unless_terminal_option
def evaluate(settings: Settings, version: int | None, as_json: bool) -> None:
    """Evaluate a policy version on the held-out prompts.

    Answers are greedy. The result is added to the run's evals.jsonl, and printed: a table on a
    terminal, else JSON.
    """
    from rich.console import Console

    from onstream.workers.evaluation.versions import evaluate_version, show

    row = evaluate_version(settings, version)
    if prints_json(as_json):
        click.echo(json.dumps(row))
    else:
        show(row, settings.run.name, Console())
