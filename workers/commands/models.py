"""`onstream models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click


@click.group()
def models() -> None:
    """Small models for the examples."""


@models.command()
@click.argument("task")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory that gets teacher/ and student/.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Seed of weights and problems.",
)
@click.option("--only", type=click.Choice(["teacher", "student"]), help="Make only one of them.")
@click.option(
    "--family",
    default="llava",
    show_default=True,
    type=click.Choice(["llava", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "gemma3"]),
    help="The architecture, for a task with pictures.",
)
@click.option(
    "--environment",
    type=click.Choice(["calculator"]),
    help="Play episodes in it; with the task arithmetic.",
)
def make(
    task: str,
    out: Path,
    seed: int,
    only: Literal["teacher", "student"] | None,
    family: Any,
    environment: str | None,
) -> None:
    """Make a teacher and a weaker student for TASK.

    Both are trained on the right answers of the task, or right episodes.
    """
    from onstream.pipeline import telemetry
    from onstream.settings.sections.run import LogSettings
    from onstream.workers.tiny_models.make import make

    telemetry.configure("models", "make", task, LogSettings())
    for made in make(task, out, seed, only, family, environment):
        result = f"{made.exact:.1%} exact, {made.parameters:,} parameters"
        click.echo(f"{made.directory}: {result}, {made.steps} steps, {made.seconds:.0f} s")
