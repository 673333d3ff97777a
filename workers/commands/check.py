"""`onstream check`."""

from __future__ import annotations

from pathlib import Path

import click

from onstream.pipeline.errors import Exit
from onstream.workers.commands.options import settings_sources


@click.command()
@settings_sources
@click.option("--all", "everything", is_flag=True, help="Print settings at their defaults too.")
def check(files: tuple[Path, ...], overrides: tuple[str, ...], everything: bool) -> Exit:
    """Print the settings, the plan and every problem."""
    from rich.console import Console

    from onstream.settings.check import report
    from onstream.settings.load import resolve

    return report(resolve(files, overrides), Console(), everything=everything)
