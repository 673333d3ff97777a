"""What a run takes as it grows: by model, completion, vocabulary and workers, in one table.

    python -m benchmarks.growth [--axis model completion vocabulary workers] [--steps 8]

Each row is a real `onstream up` with models of random weights, the student's and the teacher's of
one shape. It differs from the first row in one thing. Random weights hardly ever end an answer, so
completions have their full length. The first steps, and the last ones, for which no new rollouts
are written any more, are not timed. What grows with the rollouts of a run is in
`benchmarks/long_runs.py`.

Results are kept in runs/growth/results.jsonl: a table that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from string import ascii_lowercase

from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config

from benchmarks.kept_results import KeptResults, Result
from benchmarks.peers.measured import rates
from benchmarks.peers.runner import watched
from onstream.workers.tiny_models.fresh import save_fresh

DIRECTORY = Path("runs/growth")
RUN = "growth"
PROMPT_CHARACTERS = 59  # with the chat template 64 tokens
BATCH = 32
GROUP = 4
UNTIMED = 2
AHEAD = 2
"""Steps that generators are ahead; so many at the end are not timed."""
CONTEXT_TOKENS = 4096
HEAD_DIM = 32
WIDTH = 160  # characters; a file has no width of its own
SHAPES = {
    "0.4M": (96, 3),
    "5M": (256, 6),
    "25M": (512, 8),
    "100M": (768, 14),
}
"""Width and layers. The name counts the parameters without the embedding."""
WORKERS = ("generator", "verifier", "teacher")


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str = "5M"
    completion: int = 64  # tokens
    vocabulary: int = 4096  # tokens
    workers: int = 1  # of each kind but the trainer


BASE = Case()
AXES: dict[str, list[Case]] = {
    "model": [replace(BASE, model=model) for model in SHAPES],
    "completion": [replace(BASE, completion=tokens) for tokens in (16, 64, 256, 1024, 2048)],
    "vocabulary": [replace(BASE, vocabulary=size) for size in (128, 4096, 32768, 131072)],
    "workers": [replace(BASE, workers=count) for count in (1, 2, 4, 8)],
}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    options.add_argument("--steps", type=int, default=8)
    asked = options.parse_args()
    if asked.steps <= UNTIMED + AHEAD:
        options.error(f"--steps {asked.steps}; expected at least {UNTIMED + AHEAD + 1}")
    kept = KeptResults(DIRECTORY / "results.jsonl")
    table = Table(
        "model", "completion", "vocabulary", "workers", "rollouts/s", "tokens/s",
        "CPU ms a rollout", "by worker", "peak MiB",
    )  # fmt: skip
    cases = dict.fromkeys(itertools.chain.from_iterable(AXES[axis] for axis in asked.axis))
    for at, case in enumerate(cases, start=1):
        print(f"{at} of {len(cases)}: {case}", flush=True)
        table.add_row(*cells(case, result_of(kept, case, asked.steps)))
    Console(width=WIDTH).print(table)


def result_of(kept: KeptResults, case: Case, steps: int) -> Result:
    """The result of a case; it is measured where it is not kept yet."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    run = {"case": asdict(case), "steps": steps, "cores": os.cpu_count(), "versions": versions}
    return kept.get(run, lambda: measured(case, steps))


def measured(case: Case, steps: int) -> Result:
    """One run of the case."""
    with tempfile.TemporaryDirectory(prefix="onstream-growth-") as scratch:
        directory = Path(scratch)
        given = [*overrides(case, steps, directory), f"run.dir={directory}", f"run.name={RUN}"]
        words = [word for value in given for word in ("--set", value)]
        command = [sys.executable, "-P", "-m", "onstream", "up", *words]
        usage = watched(command, {"PYTHONPATH": os.getcwd()})
        run = directory / RUN
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        report = json.loads((run / "report.json").read_text())
    found = rates(rows, usage, UNTIMED, AHEAD)
    return found | {"cpu_seconds": report["cpu_seconds"], "rollouts": report["rollouts"]}


def overrides(case: Case, steps: int, directory: Path) -> list[str]:
    """The settings of a case, whose models and problems are written into `directory`."""
    for seed, role in enumerate(("student", "teacher")):
        save_fresh(directory / role, config_of(case), seed)
    problems = directory / "problems.jsonl"
    problems.write_text("".join(lines(BATCH // GROUP * (steps + AHEAD + 1))))
    return [
        f"model.name={directory / 'student'}",
        f"teacher_inference.model.name={directory / 'teacher'}",
        "task.name=jsonl",
        f"task.path={problems}",
        "deployment.device=cpu",
        "eval.samples=0",
        f"orchestrator.batch_size={BATCH}",
        f"orchestrator.group_size={GROUP}",
        f"orchestrator.max_off_policy_steps={AHEAD}",
        f"inference.sampling.max_completion={case.completion}",
        "trainer.loss.teacher_tau=1.0",
        "trainer.loss.adv_tau=0.0",
        f"trainer.max_steps={steps}",
        *(f"deployment.workers.{kind}={case.workers}" for kind in WORKERS),
    ]


def config_of(case: Case) -> Qwen3Config:
    """A Qwen3 model with tied embeddings. Of its vocabulary the tokenizer has the first 128."""
    hidden, layers = SHAPES[case.model]
    return Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=max(1, hidden // HEAD_DIM // 2),
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
    )


def lines(count: int) -> Iterator[str]:
    """Problems of random letters, without an answer."""
    random = Random(0)
    for _ in range(count):
        prompt = "".join(random.choices(ascii_lowercase, k=PROMPT_CHARACTERS))
        yield json.dumps({"prompt": prompt, "answer": ""}) + "\n"


def cells(case: Case, result: Result) -> list[str]:
    """One row's."""
    by_worker = {
        kind: 1000 * spent / result["rollouts"] for kind, spent in result["cpu_seconds"].items()
    }
    return [
        case.model,
        str(case.completion),
        f"{case.vocabulary:,}",
        str(case.workers),
        f"{result['rollouts_per_s']:.3g}",
        f"{result['tokens_per_s']:,.0f}",
        f"{1000 * result['cpu_s_per_rollout']:,.1f}",
        ", ".join(f"{kind} {spent:.2g}" for kind, spent in by_worker.items()),
        f"{result['peak_bytes'] / 2**20:,.0f}",
    ]


if __name__ == "__main__":
    main()
