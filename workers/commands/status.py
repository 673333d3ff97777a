"""`onstream status`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from onstream.workers.commands.options import as_json_option, load, settings_sources


@click.command()
@settings_sources
@as_json_option
def status(files: tuple[Path, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a run does and what it waits for.

    That is its stages, backlog, workers and policy version, and what went wrong last. Without
    FILES, list the runs.
    """
    from rich.console import Console

    from onstream.workers.api.run import Run
    from onstream.workers.inspection.run_list import run_list, show_list
    from onstream.workers.inspection.status import show

    settings = load(files, overrides)
    one_run = files or overrides or os.environ.get("ONSTREAM_RUN__NAME")
    found = Run(settings).status() if one_run else run_list(settings.run.dir)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif isinstance(found, list):
        show_list(found, Console())
    else:
        show(found, Console())
