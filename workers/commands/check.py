"""`onstream check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onstream.pipeline.errors import Exit
from onstream.workers.commands.options import as_json_option, settings_sources

if TYPE_CHECKING:
    from onstream.settings.check import Findings
    from onstream.settings.load import Resolved


@click.command()
@settings_sources
@click.option("--all", "everything", is_flag=True, help="Print settings at their defaults too.")
@click.option("--online", is_flag=True, help="Ask Redis, the endpoints and the hub as well.")
@as_json_option
def check(
    files: tuple[Path, ...],
    overrides: tuple[str, ...],
    everything: bool,
    online: bool,
    as_json: bool,
) -> Exit:
    """Print the settings, the plan and every problem.

    The plan says what the trainer takes of its memory, the rate that it learns at, and what the run
    may cost on a GPU. Looks for all that can be known before a model is loaded, as `onstream up`
    does: models, task, scorer, packages, GPUs, Redis and disk. Nothing is started, and no network
    is asked.
    """
    from rich.console import Console

    from onstream.settings.check import as_data, report
    from onstream.settings.load import resolve

    resolved = resolve(files, overrides)
    here = _findings(resolved, online=online)
    if as_json:
        click.echo(json.dumps(as_data(resolved, here, everything=everything), indent=2))
    else:
        report(resolved, here, Console(), everything=everything)
    return Exit.USAGE if resolved.problems or here.problems else Exit.OK


def _findings(resolved: Resolved, *, online: bool) -> Findings:
    """What this machine adds to the settings."""
    from onstream.settings.check import Findings
    from onstream.workers.launcher.learning_rate import learning_rate_line
    from onstream.workers.launcher.model_warnings import model_warnings
    from onstream.workers.launcher.preflight import find_problems
    from onstream.workers.launcher.run_cost import cost_rows
    from onstream.workers.launcher.trainer_memory import memory_rows

    problems = find_problems(resolved, online=online)
    if (settings := resolved.settings) is None:
        return Findings(problems)
    return Findings(
        problems,
        warnings=tuple(model_warnings(settings)),
        memory=memory_rows(settings),
        cost=cost_rows(settings),
        rate=learning_rate_line(settings),
    )
