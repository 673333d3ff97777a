"""The whole pipeline on an example: rollouts/s with the CPU seconds of each stage, and steps and
seconds to 95 % for both teacher terms.

    python benchmarks/end_to_end.py [--example reverse-text] [--seeds 3] [--steps 80]

Each run is a real `onstream up`: separate workers, Redis Streams, evaluation apart. What others
need for the same is in `make bench-peers`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.peers.measured import GOAL, exact, way_to_goal
from onstream.pipeline.run_files.json_lines import read_rows
from onstream.settings.load import load_settings

TERMS = {
    "top-k": ["trainer.loss.teacher_top_k=4"],
    "sampled": ["trainer.loss.teacher_top_k=0", "trainer.optim.lr=5e-4"],
}  # 1e-3 is too high a rate for it
WIDTH = 200  # characters; a file has no width of its own


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--example", default="reverse-text", help="a directory of examples/")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=80)
    asked = options.parse_args()
    table = Table(
        "term",
        "seed",
        "exact before",
        "exact after",
        f"steps to {GOAL}",
        "seconds",
        "rollouts/s",
        "CPU s by worker",
    )
    with tempfile.TemporaryDirectory(prefix="onstream-bench-") as runs:
        for term, seed in itertools.product(TERMS, range(asked.seeds)):
            table.add_row(*row(term, seed, asked.example, asked.steps, Path(runs)))
            Console(width=WIDTH).print(table)


def row(term: str, seed: int, example: str, steps: int, runs: Path) -> list[str]:
    """One run of the example and what it showed."""
    file = Path("examples") / example / "onstream.toml"
    given = [
        f"run.seed={seed}",
        f"run.name={example}-{term}-{seed}",
        f"run.dir={runs}",
        f"trainer.max_steps={steps}",
    ]
    given += [f"checkpoint.keep_policies={steps + 1}", *TERMS[term]]
    run(file, given)
    directory = runs / f"{example}-{term}-{seed}"
    report = json.loads((directory / "report.json").read_text())
    settings = load_settings([file], given)
    rows = read_rows(directory / "metrics.jsonl")
    policies = directory / "policies"
    way = way_to_goal(rows, lambda step: exact(policies / f"{step:06d}", settings))
    reached = way["steps_to_goal"]
    seconds = way["seconds_to_goal"] or report["seconds"]
    cpu = {kind: spent for kind, spent in report["cpu_seconds"].items() if kind != "eval"}
    return [
        term,
        str(seed),
        f"{report['eval']['before']:.3f}",
        f"{report['eval']['after']:.3f}",
        str(reached) if reached else f"not in {steps}",
        f"{seconds:.1f} of {report['seconds']:.1f}",
        f"{report['rollouts_per_s']:.0f}",
        shares(cpu),
    ]


def run(file: Path, given: list[str]) -> None:
    """`onstream up` with `given` on top of `file`.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    command = [
        sys.executable,
        "-m",
        "onstream",
        "up",
        str(file),
        *(word for value in given for word in ("--set", value)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def shares(seconds: Mapping[str, float]) -> str:
    """CPU seconds by worker, on one line."""
    return ", ".join(f"{kind} {spent:.1f}" for kind, spent in seconds.items())


if __name__ == "__main__":
    main()
