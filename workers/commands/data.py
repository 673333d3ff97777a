"""`onstream data`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import with_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_settings
@click.option(
    "--prompts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Prompts to print.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Prompts to count the tokens of, and as many held-out ones.",
)
def data(settings: Settings, prompts: int, sample: int) -> None:
    """Print prompts, their lengths, and what is asked twice.

    Prompts are printed as the student reads them, through its chat template. Says which leave no
    room for a completion. Reads every row of a file or data set; no model is loaded.
    """
    from rich.console import Console

    from onstream.workers.inspection.task_preview import preview

    preview(settings, Console(), prompts=prompts, sample=sample)
