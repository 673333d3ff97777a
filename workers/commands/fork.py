"""`onstream fork`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import with_run_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_run_settings
@click.argument("name")
@click.option(
    "--at",
    "step",
    type=click.IntRange(min=0),
    help="The step of a checkpoint; by default the newest.",
)
def fork(settings: Settings, name: str, step: int | None) -> None:
    """Make a new run NAME from a checkpoint of RUN.

    RUN stays as it is. `onstream up` with the new run's directory goes on with it.
    """
    from onstream.workers.jobs.fork import fork

    directory, at = fork(settings, name, step)
    click.echo(f"run {name} is in {directory}, at step {at} of run {settings.run.name}")
    click.echo(f"go on with it: onstream up {directory}")
