"""One run of Onstream: `onstream up` on the example's settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.pairs import EXAMPLE, ModelPair
from benchmarks.peers.sizes import Size

SETTINGS = EXAMPLE / "onstream.toml"
RUN = "peers"


def overrides(size: Size, pair: ModelPair, steps: int, seed: int) -> list[str]:
    """What differs from the example: lengths and paths, and of the run, its length and seed."""
    given = [f"run.seed={seed}", f"trainer.max_steps={steps}"]
    if pair.problems is None:
        return given
    return [
        *given,
        f"model.name={pair.student}",
        f"teacher_inference.model.name={pair.teacher}",
        "task.name=jsonl",
        f"task.path={pair.problems}",
        f"orchestrator.batch_size={size.batch}",
        f"orchestrator.group_size={size.group}",
        f"inference.sampling.max_completion={size.max_completion}",
        "eval.samples=0",
    ]


def command(given: Sequence[str], directory: Path, kept_policies: int) -> list[str]:
    """`onstream up` with `given`; nothing is evaluated in its course."""
    own = [
        f"run.dir={directory}",
        f"run.name={RUN}",
        "eval.samples=0",
        f"checkpoint.keep_policies={kept_policies}",
    ]
    words = [word for value in [*given, *own] for word in ("--set", value)]
    return [sys.executable, "-P", "-m", "onstream", "up", str(SETTINGS), *words]


def steps_of(directory: Path) -> list[dict[str, Any]]:
    """The rows of the run's metrics, which have what a run is measured by."""
    lines = (directory / RUN / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def policy(directory: Path, step: int) -> Path:
    """The policy that `step` made."""
    return directory / RUN / "policies" / f"{step:06d}"
