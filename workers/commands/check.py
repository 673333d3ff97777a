"""`onstream check`."""

from __future__ import annotations

from pathlib import Path

import click

from onstream.pipeline.errors import Exit
from onstream.workers.commands.options import settings_sources


@click.command()
@settings_sources
@click.option("--all", "everything", is_flag=True, help="Print settings at their defaults too.")
@click.option("--online", is_flag=True, help="Ask Redis, the endpoints and the hub as well.")
def check(
    files: tuple[Path, ...], overrides: tuple[str, ...], everything: bool, online: bool
) -> Exit:
    """Print the settings, the plan and every problem.

    The plan says what the trainer takes of its memory, the rate that it learns at, and what the run
    may cost on a GPU. Looks for
    all that can be known before a model is loaded, as `onstream up` does: models, task, scorer,
    packages, GPUs, Redis and disk. Nothing is started, and no network is asked.
    """
    from rich.console import Console

    from onstream.settings.check import report
    from onstream.settings.load import resolve
    from onstream.workers.launcher.learning_rate import learning_rate_line
    from onstream.workers.launcher.model_warnings import model_warnings
    from onstream.workers.launcher.preflight import find_problems
    from onstream.workers.launcher.run_cost import cost_rows
    from onstream.workers.launcher.trainer_memory import memory_rows

    resolved = resolve(files, overrides)
    found = find_problems(resolved, online=online)
    warnings = model_warnings(resolved.settings) if resolved.settings is not None else ()
    memory = memory_rows(resolved.settings) if resolved.settings is not None else {}
    cost = cost_rows(resolved.settings) if resolved.settings is not None else {}
    rate = learning_rate_line(resolved.settings) if resolved.settings is not None else None
    return report(
        resolved,
        found,
        Console(),
        everything=everything,
        warnings_here=warnings,
        memory_here=memory,
        rate_here=rate,
        cost_here=cost,
    )
