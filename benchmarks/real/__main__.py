"""Distils a real language model on this machine, beside a control; `make real` runs it.

    python -m benchmarks.real [--seeds 0 1] [--set trainer.max_steps=20 ...]

Each run is `onstream up examples/smollm2/onstream.toml`. In the control the teacher reads the
student's own prompt, without the worked examples: nothing is to be learned there. The command
fails where a run does not rise clearly, or its control does. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.real.commands import exported, onstream
from benchmarks.real.intervals import interval, shares
from benchmarks.real.plain import right_answers
from benchmarks.real.problems import write_problems

EXAMPLE = Path("examples/smollm2")
SETTINGS = EXAMPLE / "onstream.toml"
HELD_OUT = EXAMPLE / "held_out.jsonl"
RUNS = Path("runs")
WIDTH = 120  # characters; a file has no width of its own
WITHOUT_EXAMPLES = "task.teacher_prompt.examples=[]"


@dataclass(frozen=True)
class Measured:
    """What a run came to: right answers of `asked`, before and after it."""

    name: str
    before: int
    after: int
    asked: int
    seconds: float

    @property
    def rises(self) -> bool:
        """Whether the interval after the run lies above that before it."""
        return interval(self.after, self.asked)[0] > interval(self.before, self.asked)[1]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--set", action="append", default=[], dest="sets")
    asked = options.parse_args()
    write_problems(EXAMPLE / "problems.jsonl", HELD_OUT)
    taught = [run(f"smollm2-{seed}", [f"run.seed={seed}", *asked.sets]) for seed in asked.seeds]
    control = run("smollm2-control", [f"run.seed={asked.seeds[0]}", WITHOUT_EXAMPLES, *asked.sets])
    show([*taught, control])
    first = RUNS / taught[0].name
    plain = right_answers(exported(first, first / "exported"), HELD_OUT)
    print(f"{taught[0].name}, exported, in plain transformers: {plain} of {taught[0].asked} right")
    if control.rises or not all(one.rises for one in taught):
        sys.exit("not shown: a run did not rise clearly, or its control did")


def run(name: str, given: Sequence[str]) -> Measured:
    """`onstream up` of the example with `given` on top."""
    print(f"\n== {name}", flush=True)
    sets = [word for value in (f"run.name={name}", *given) for word in ("--set", value)]
    onstream("up", str(SETTINGS), *sets)
    report = json.loads((RUNS / name / "report.json").read_text())
    found = report["eval"]
    before, after = (round(found[when] * found["samples"]) for when in ("before", "after"))
    return Measured(name, before, after, found["samples"], report["seconds"])


def show(runs: Sequence[Measured]) -> None:
    """A row for each run."""
    table = Table("run", "right before", "95 %", "right after", "95 %", "minutes of training")
    for one in runs:
        table.add_row(
            one.name,
            *shares(one.before, one.asked),
            *shares(one.after, one.asked),
            f"{one.seconds / 60:.1f}",
        )
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    main()
