"""`onstream dead`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import Command, as_json_option, with_run_settings

if TYPE_CHECKING:
    from onstream.pipeline.redis.operator_requests import RequestKind
    from onstream.settings.root import Settings

ROLLOUTS_SHOWN = 20


@click.group()
def dead() -> None:
    """List, show, requeue or purge rollouts that were given up."""


@dead.command("list")
@with_run_settings
@as_json_option
def list_letters(settings: Settings, as_json: bool) -> None:
    """List the dead letters by reason."""
    from rich.console import Console

    from onstream.workers.api.run import Run
    from onstream.workers.inspection.dead_letters import show_reasons

    found = Run(settings).dead_letters()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show_reasons(found, Console())


@dead.command("show")
@with_run_settings
@click.argument("number")
def show_letter(settings: Settings, number: str) -> None:
    """Print the dead letter of rollout NUMBER (such as 17) as JSON.

    It has the record that failed in it.
    """
    from onstream.workers.inspection.dead_letters import letters_of
    from onstream.workers.launcher.open_run import open_run

    with open_run(settings, purpose="dead") as bus:
        click.echo(json.dumps(letters_of(bus, settings.run_dir, number), indent=2))


def letter_selection(command: Command) -> Command:
    """Give `command` the ways to say which dead letters: `numbers`, `reason`, `everything`."""
    numbers = click.argument("numbers", nargs=-1)
    reason = click.option(
        "--reason", metavar="TEXT", help="Those with this reason, or with TEXT in it."
    )
    everything = click.option("--all", "everything", is_flag=True, help="Every dead letter.")
    return numbers(reason(everything(command)))


@dead.command("requeue")
@with_run_settings
@letter_selection
def requeue_letters(
    settings: Settings, numbers: tuple[str, ...], reason: str | None, everything: bool
) -> None:
    """Ask the trainer for new rollouts in place of dead ones.

    The dead ones stay dead.
    """
    _ask("requeue", settings, numbers, reason, everything)


@dead.command("purge")
@with_run_settings
@letter_selection
def purge_letters(
    settings: Settings, numbers: tuple[str, ...], reason: str | None, everything: bool
) -> None:
    """Ask the trainer to delete dead letters.

    The audit then counts their rollouts as dropped.purged.
    """
    _ask("purge", settings, numbers, reason, everything)


def _ask(
    kind: RequestKind,
    settings: Settings,
    numbers: tuple[str, ...],
    reason: str | None,
    everything: bool,
) -> None:
    from onstream.workers.inspection.dead_letters import ask_trainer
    from onstream.workers.launcher.open_run import open_run

    with open_run(settings, purpose="dead") as bus:
        asked = ask_trainer(bus, settings.run_dir, kind, numbers, reason, everything=everything)
        at_work = any(worker.stage == "train" for worker in bus.state.workers())
    shown = asked[:ROLLOUTS_SHOWN]
    if len(asked) > len(shown):
        shown.append("…")
    click.echo(f"asked the trainer to {kind} {len(asked)}: {', '.join(shown)}")
    if not at_work:
        click.echo("no trainer is at work: it will do so when the run is resumed")
