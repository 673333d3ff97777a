"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from onstream.settings.stages import KINDS

if TYPE_CHECKING:
    from onstream.settings.root import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
unless_terminal_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, on a terminal too."
)
worker_kind_argument = click.argument("kind", type=click.Choice(KINDS), metavar="KIND")
version_option = click.option(
    "--version",
    type=click.IntRange(min=0),
    help="The policy version; by default the newest on disk.",
)


def settings_sources(command: Command) -> Command:
    """Give `command` the arguments that settings come from: `files` and `overrides`."""
    files = click.argument("files", nargs=-1, type=click.Path(path_type=Path))
    overrides = _set_option("Override a setting: --set trainer.max_steps=20.")
    return files(overrides(command))


def existing_run(command: Command) -> Command:
    """Give `command` a run that was started before: `run` and `overrides`."""
    run = click.argument("run", type=click.Path(path_type=Path))
    overrides = _set_option("Override a setting of the run.")
    return run(overrides(command))


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the settings that FILES and --set say, as its argument `settings`."""

    @wraps(command)
    def with_loaded(files: tuple[Path, ...], overrides: tuple[str, ...], **options: Any) -> Any:
        return command(settings=load(files, overrides), **options)

    return settings_sources(with_loaded)


def with_run_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the settings that RUN was started with, as its argument `settings`."""

    @wraps(command)
    def with_loaded(run: Path, overrides: tuple[str, ...], **options: Any) -> Any:
        return command(settings=load([run], overrides), **options)

    return existing_run(with_loaded)


def load(files: Sequence[Path], overrides: Sequence[str]) -> Settings:
    """The settings of `files` and `overrides`.

    Raises:
        UserError: a file cannot be read, or a setting is wrong.
    """
    # Imported here: pydantic takes longer to import than `--help` may take.
    from onstream.settings.load import load_settings

    settings = load_settings(files, overrides)
    if settings.run.modules is not None:
        from onstream.pipeline.import_path import search_modules_in

        search_modules_in(settings.run.modules)
    return settings


def prints_json(as_json: bool) -> bool:
    """Whether a command prints JSON: where it was asked for, or its output is no terminal."""
    return as_json or not sys.stdout.isatty()


def _set_option(help_text: str) -> Callable[[Command], Command]:
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="NAME=VALUE",
        help=help_text,
    )
