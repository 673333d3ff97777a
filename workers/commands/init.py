"""`onstream init`."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.argument("directory", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write settings, problems and a scorer to begin with.

    They are written into DIR, by default the working directory, with a small random student. They
    run as they are, and are there to be changed.
    """
    from onstream.workers.tiny_models.starter import write_starter

    for path in write_starter(directory):
        click.echo(path)
    go_there = "" if directory.resolve() == Path(os.getcwd()) else f"cd {directory} && "
    click.echo(f"next: {go_there}onstream up onstream.toml")
