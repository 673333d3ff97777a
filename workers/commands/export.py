"""`onstream export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import version_option, with_run_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_run_settings
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The directory to write."
)
@version_option
def export(settings: Settings, out: Path, version: int | None) -> None:
    """Write a policy version as a model directory.

    It loads by itself: an adapter is merged into the weights.
    """
    from onstream.workers.jobs.export import export

    click.echo(f"version {export(settings, version, out)} is in {out}")
