"""`onstream health`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.pipeline.errors import Exit
from onstream.settings.stages import WorkerKind
from onstream.workers.commands.options import with_settings, worker_kind_argument

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@worker_kind_argument
@with_settings
@click.option(
    "--live", is_flag=True, help="Ask only whether it is alive: one that still starts is."
)
@click.option(
    "--slot",
    metavar="NAME",
    help="The worker that was started with this --slot; by default any of KIND on this machine.",
)
def health(kind: WorkerKind, settings: Settings, live: bool, slot: str | None) -> Exit:
    """Tell by the exit code whether a worker is ready.

    The worker is that of KIND on this machine; 0 is ready. This is the health check of a container.
    """
    from onstream.workers.inspection.health import health

    found = health(kind, settings, live=live, slot=slot)
    click.echo(found.message)
    return found.exit
