"""`onstream status` without a run: the runs of a directory, from their files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from onstream.pipeline.command_line import command
from onstream.pipeline.errors import UserError
from onstream.workers.inspection.run_phase import read_run_files
from onstream.workers.inspection.tables import add_row, plain_table


def run_list(directory: Path) -> list[dict[str, Any]]:
    """The runs in `directory` as JSON data, by name."""
    found = sorted(path.parent for path in directory.glob("*/settings.toml"))
    return [_row(run_dir) for run_dir in found]


def _row(run_dir: Path) -> dict[str, Any]:
    try:
        files = read_run_files(run_dir)
    except UserError as error:
        return {"run": str(run_dir), "phase": "unreadable", "reason": error.got}
    return {
        "run": str(run_dir),
        "phase": files.phase,
        "step": files.step,
        "max_steps": files.max_steps,
    }


def show_list(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what `run_list` returned, for people."""
    if not rows:
        console.print(Text(f"no runs here; `{command()} up FILE` starts one"), soft_wrap=True)
        return
    table = plain_table("run", "state", "checkpoint")
    for row in rows:
        step = f"step {row['step']} of {row['max_steps']}" if "step" in row else row["reason"]
        add_row(table, row["run"], row["phase"], step)
    console.print(table)
    console.print(Text(f"`{command()} status RUN` tells more of one"), soft_wrap=True)
