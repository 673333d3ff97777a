"""Evaluations of a run's policy versions, one line each in its `evals.jsonl`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from onstream.pipeline import telemetry
from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files.json_lines import JsonLines
from onstream.settings.root import Settings
from onstream.workers.trainer.durability import checkpoint


def evaluate_version(settings: Settings, version: int | None) -> dict[str, Any]:
    """Evaluate `version` (by default the newest on disk) and append the result to the run's
    evals.jsonl.

    Raises:
        UserError: the run has no such version, or its model cannot be loaded.
    """
    directory, version = find_version(settings, version)
    from onstream.workers.evaluation.greedy import evaluate  # brings torch

    telemetry.configure("eval", f"eval-{version}", settings.run.name, settings.log)
    row = {"version": version, "time": time.time(), **evaluate(directory, settings)}
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    evals = JsonLines(settings.run_dir / "evals.jsonl")
    evals.write(row)
    evals.sync()
    evals.close()
    return row


def find_version(settings: Settings, version: int | None) -> tuple[Path, int]:
    """Where the weights of `version` (None: the newest) lie: published, in a checkpoint, or, for 0,
    the starting student's.

    Raises:
        UserError: nowhere.
    """
    kept = checkpoint.by_step(settings.run_dir / checkpoint.FOLDER)
    kept |= {int(path.name): path for path in (settings.run_dir / "policies").glob("[0-9]*")}
    kept.setdefault(0, Path(settings.model.name))
    wanted = max(kept) if version is None else version
    if wanted not in kept:
        raise UserError(
            f"policy version {wanted} of {settings.run_dir}",
            expected=f"one that is kept: {', '.join(map(str, sorted(kept)))}",
            next_step="Choose one of those; checkpoint.keep_policies and checkpoint.keep_every say which are kept.",
        )
    return kept[wanted], wanted
