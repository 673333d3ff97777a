"""`onstream audit`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from onstream.pipeline.errors import Exit
from onstream.workers.commands.options import with_run_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_run_settings
@click.option(
    "--uids", is_flag=True, help="Print the rollouts themselves, not only how many there are."
)
def audit(settings: Settings, uids: bool) -> Exit:
    """Print as JSON what became of every rollout.

    Exits with 1 if any is lost or duplicated, or if streams, ledger and metrics hold what the run
    never issued or contradict one another.
    """
    from onstream.workers.api.run import Run

    found = Run(settings).audit(uids=uids)
    click.echo(json.dumps(found, indent=2))
    failed = found["lost"] or found["duplicated"] or "beyond" in found
    return Exit.FAILED if failed else Exit.OK
