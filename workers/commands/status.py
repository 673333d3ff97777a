"""`onstream status`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onstream.workers.commands.options import as_json_option, load, settings_sources

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@settings_sources
@as_json_option
def status(files: tuple[Path, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a run does and what it waits for.

    That is its stages, backlog, workers and policy version, and what went wrong last. Without
    FILES, list the runs.
    """
    from rich.console import Console

    from onstream.workers.inspection.run_list import run_list, show_list
    from onstream.workers.inspection.status import show

    settings = load(files, overrides)
    one_run = files or overrides or os.environ.get("ONSTREAM_RUN__NAME")
    found = _state(settings) if one_run else run_list(settings.run.dir)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif isinstance(found, list):
        show_list(found, Console())
    else:
        show(found, Console())


def _state(settings: Settings) -> dict[str, Any]:
    """The state of the run; as far as its files tell, where its Redis cannot be asked."""
    from onstream.pipeline.errors import UserError
    from onstream.workers.inspection.run_phase import read_run_files
    from onstream.workers.inspection.status import status, status_of_files
    from onstream.workers.launcher.open_run import open_run

    run_files = read_run_files(settings.run_dir)
    try:
        with open_run(settings, purpose="status") as bus:
            return status(bus, run_files)
    except UserError as error:
        if run_files.plan is None:
            raise
        return status_of_files(run_files, error.got)
