"""`onstream jobs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import as_json_option, version_option, with_run_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


class ListByDefaultGroup(click.Group):
    """A group with a command `list` that need not be typed: `onstream jobs RUN` lists jobs."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` begin with, or `list`."""
        if args[0] not in self.commands:
            args = ["list", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=ListByDefaultGroup)
def jobs() -> None:
    """List evaluations, exports and pruning, or ask for them.

    Jobs workers do them beside the training. `onstream jobs RUN` lists them with their results.
    """


@jobs.command("list")
@with_run_settings
@as_json_option
def list_jobs(settings: Settings, as_json: bool) -> None:
    """List the jobs of a run, the newest first."""
    from rich.console import Console

    from onstream.workers.jobs.requests import listed, show

    rows = listed(settings)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        show(rows, Console())


@jobs.command("evaluate")
@with_run_settings
@version_option
def ask_evaluation(settings: Settings, version: int | None) -> None:
    """Ask for the evaluation of a policy version."""
    from onstream.workers.jobs.requests import ask_evaluation

    click.echo(ask_evaluation(settings, version))


@jobs.command("export")
@with_run_settings
@version_option
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    help="The directory to make, on the machine of the jobs worker.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Cast the weights; by default they stay as they are.",
)
@click.option("--upload", is_flag=True, help="Run the command of jobs.upload on it.")
def ask_export(
    settings: Settings,
    version: int | None,
    to: Path | None,
    dtype: str | None,
    upload: bool,
) -> None:
    """Ask for a policy version as a model directory.

    It is written to --to, or handed to --upload, or both.
    """
    from onstream.workers.jobs.requests import ask_export

    click.echo(ask_export(settings, version, to, dtype, upload=upload))


@jobs.command("prune")
@with_run_settings
def ask_prune(settings: Settings) -> None:
    """Ask for the removal of old policies and checkpoints.

    That is of those that no setting and no job keeps.
    """
    from onstream.workers.jobs.requests import ask_prune

    click.echo(ask_prune(settings))
