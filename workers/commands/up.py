"""`onstream up`."""

from __future__ import annotations

from pathlib import Path

import click

from onstream.pipeline.errors import Exit
from onstream.workers.commands.options import load, settings_sources


@click.command()
@settings_sources
def up(files: tuple[Path, ...], overrides: tuple[str, ...]) -> Exit:
    """Start a run on this machine and wait for its end.

    Starts Redis and all workers of the run, and shows its progress. Ctrl-C stops the run without
    losing a rollout; the same command resumes it.
    """
    settings = load(files, overrides)
    from onstream.workers.launcher.launcher import up

    return up(settings, files, overrides)
