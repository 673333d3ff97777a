"""Compresses a real language model to half of its layers on this machine; `make compression`.

    python -m benchmarks.real.compression [--set trainer.max_steps=200 ...]

The student is made of half of the teacher's layers. It learns from the teacher's text first (the
run `hard`), then on its own answers (`on-policy`, and shorter runs beside it from the same start).
The table says what each came to. What was stopped goes on, and what is done is not done again:
delete `runs/compression`, and `model` and `taught` in examples/smollm2-half, to begin anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.real.chat_server import chat_server
from benchmarks.real.commands import exported, onstream
from benchmarks.real.compression_curves import draw
from benchmarks.real.half import make_half
from benchmarks.real.intervals import shares
from benchmarks.real.measure import Measured, measure
from benchmarks.real.problems import write_problems, write_varied_problems
from onstream.pipeline.tasks import Problem, load_task
from onstream.settings.load import load_settings

PROBLEMS = Path("examples/smollm2")
TEACHER = PROBLEMS / "model"
EXAMPLE = Path("examples/smollm2-half")
HARD = EXAMPLE / "hard.toml"
ON_POLICY = EXAMPLE / "onstream.toml"
HALF = EXAMPLE / "model"
TAUGHT = EXAMPLE / "taught"
RUNS = Path("runs/compression")
WIDTH = 120  # characters; a file has no width of its own
SHORT = "trainer.max_steps=40"
VARIANTS: Mapping[str, Sequence[str]] = {
    "on-policy": [],
    "sampled": [SHORT, "trainer.loss.teacher_top_k=0"],
    "lora": [SHORT, "trainer.lora.rank=16", "trainer.optim.lr=1e-3"],
}
"""Runs from the student that was taught by text, and what differs from `ON_POLICY`."""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--set", action="append", default=[], dest="sets", help="a setting of the on-policy runs"
    )
    given = options.parse_args().sets
    write_problems(PROBLEMS / "problems.jsonl", PROBLEMS / "held_out.jsonl")
    write_varied_problems(EXAMPLE / "problems.jsonl")
    if not HALF.exists():
        make_half(TEACHER, HALF)
    if not TAUGHT.exists():
        teach_by_text()
    for name, sets in VARIANTS.items():
        up(ON_POLICY, [f"run.name={name}", *sets, *given])
    show(measured_models())
    draw(RUNS, ["hard", *VARIANTS], RUNS / "curves.svg")


def teach_by_text() -> None:
    """The run `hard`, beside a server of the teacher."""
    name = load_settings([HARD]).orchestrator.teacher_rollout_model.model.name
    with chat_server(TEACHER, name, RUNS / "server.log") as url:
        up(HARD, [f"orchestrator.teacher_rollout_model.client.base_url={url}"])
    exported(RUNS / "hard", TAUGHT)


def up(file: Path, sets: Sequence[str]) -> None:
    """`onstream up` of `file` with `sets` on top."""
    onstream("up", str(file), *[word for value in sets for word in ("--set", value)])


def measured_models() -> dict[str, Measured]:
    """Teacher, student and what each run made of it, by name."""
    task = load_task(load_settings([ON_POLICY]))
    problems = [task.held_out(index) for index in range(task.held_out_size)]
    with_examples = [
        replace(one, messages=one.teacher_messages or one.messages) for one in problems
    ]
    models = {"half": HALF, "hard": TAUGHT} | {
        name: exported(RUNS / name, RUNS / name / "exported") for name in VARIANTS
    }
    return {
        "teacher": measured("teacher", TEACHER, with_examples),
        "without examples": measured("without examples", TEACHER, problems),
    } | {name: measured(name, directory, problems) for name, directory in models.items()}


def measured(name: str, directory: Path, problems: Sequence[Problem]) -> Measured:
    """The model in `directory`, measured once: RUNS/measured keeps it by `name`."""
    kept = RUNS / "measured" / f"{name}.json"
    if not kept.exists():
        found = measure(directory, TEACHER, problems)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(found), indent=2))
    return Measured(**json.loads(kept.read_text()))


def show(models: Mapping[str, Measured]) -> None:
    """A row for each model."""
    table = Table("model", "parameters", "right", "95 %", "reverse KL", "perplexity outside")
    for name, found in models.items():
        table.add_row(
            name,
            f"{found.parameters / 1e6:.0f}M",
            *shares(found.right, found.asked),
            f"{found.reverse_kl:.3f}",
            f"{found.perplexity:.1f}",
        )
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    main()
