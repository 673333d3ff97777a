"""`onstream replay`."""

from __future__ import annotations

from pathlib import Path

import click

from onstream.pipeline.errors import Exit
from onstream.workers.commands.options import existing_run


@click.command()
@existing_run
@click.option(
    "--from-step",
    type=click.IntRange(min=1),
    help="The first step wanted: start from the newest checkpoint before it.",
)
@click.option("--stop-at", type=click.IntRange(min=1), help="The last step wanted.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The directory to make; by default RUN-replay beside the run's.",
)
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Show so many samples of the last step.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON, and the rest to stderr."
)
def replay(
    run: Path,
    overrides: tuple[str, ...],
    from_step: int | None,
    stop_at: int | None,
    out: Path | None,
    worst: int,
    as_json: bool,
) -> Exit:
    """Train a recorded run again and compare the weights.

    Only a trainer runs: no other worker and no Redis is needed. Exits with 1 if the weights differ,
    and names the first step that does. With --set, a setting of the trainer is changed to see what
    it would have done; then a difference is no fault.
    """
    from onstream.workers.replay.output import output_of
    from onstream.workers.replay.replay import replay

    return replay(
        run,
        overrides,
        from_step=from_step,
        stop_at=stop_at,
        out=out,
        worst=worst,
        output=output_of(as_json),
    )
