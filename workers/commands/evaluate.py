"""`onstream eval`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import version_option, with_run_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command("eval")
@with_run_settings
@version_option
def evaluate(settings: Settings, version: int | None) -> None:
    """Evaluate a policy version on the held-out prompts.

    Answers are greedy. The result is printed, and added to the run's evals.jsonl.
    """
    from onstream.workers.evaluation.versions import evaluate_version

    click.echo(json.dumps(evaluate_version(settings, version)))
