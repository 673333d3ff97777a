"""Evaluations of a run's policy versions, one line each in its `evals.jsonl`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onstream.pipeline import telemetry
from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files.json_lines import JsonLines
from onstream.pipeline.weights.merging import model_directory
from onstream.settings.root import Settings
from onstream.workers.trainer.durability import checkpoint


def evaluate_version(settings: Settings, version: int | None) -> dict[str, Any]:
    """Evaluate `version` (None: the newest on disk) and append the result to `evals.jsonl`.

    Raises:
        UserError: the run has no such version, or its model cannot be loaded.
    """
    directory, version = find_version(settings, version)
    from onstream.workers.evaluation.greedy import evaluate  # brings torch

    telemetry.configure("eval", f"eval-{version}", settings.run.name, settings.log)
    with model_directory(directory) as whole:
        row = {"version": version, "time": time.time(), **evaluate(whole, settings)}
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    evals = JsonLines(settings.run_dir / "evals.jsonl")
    evals.write(row)
    evals.sync()
    evals.close()
    return row


def show(row: dict[str, Any], run: str, console: Console) -> None:
    """Print a line of `evals.jsonl` for people."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("run", Text(run))
    for name, value in row.items():
        if name != "time":
            table.add_row(name, Text(_figure(value)))
    console.print(table)


def _figure(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def kept_versions(run_dir: Path) -> dict[int, Path]:
    """The directories in `run_dir` that hold the weights of policy versions, by version."""
    kept = checkpoint.by_step(run_dir / checkpoint.FOLDER)
    return kept | {int(path.name): path for path in (run_dir / "policies").glob("[0-9]*")}


def find_version(settings: Settings, version: int | None) -> tuple[Path, int]:
    """The directory that holds the weights of `version` (None: the newest on disk), and its number.

    They lie among the published policies, in a checkpoint or, for version 0, where the starting
    student is.

    Raises:
        UserError: the run keeps no such version.
    """
    kept = kept_versions(settings.run_dir)
    kept.setdefault(0, Path(settings.model.name))
    if version is None:
        version = max(kept)
    if version not in kept:
        raise UserError(
            f"policy version {version} of {settings.run_dir}",
            expected=f"one that is kept: {', '.join(map(str, sorted(kept)))}",
            next_step="Choose one of those. checkpoint.keep_policies and checkpoint.keep_every "
            "say how many are kept.",
        )
    return kept[version], version
