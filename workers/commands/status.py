"""`onstream status`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import as_json_option, with_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_settings
@as_json_option
def status(settings: Settings, as_json: bool) -> None:
    """Show what a run does and what it waits for.

    That is its stages, backlog, workers and policy version, and what went wrong last.
    """
    from rich.console import Console

    from onstream.workers.inspection.status import show, status
    from onstream.workers.launcher.open_run import open_run

    with open_run(settings, purpose="status") as bus:
        state = status(bus)
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        show(state, Console())
