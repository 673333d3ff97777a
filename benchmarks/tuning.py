"""Steps to quality: settings × tasks × seeds, in one table (`make bench-tuning`).

    python -m benchmarks.tuning [--grid rate] [--tasks reverse-text arithmetic] [--seeds 3]

Real training (`benchmarks.training_loop`) with what the seed page's fourth snippet sets, the pair
of a task beside it. `--grid` names the settings that are compared; a case of one's own is
`--set trainer.optim.lr=1e-3,trainer.optim.warmup=5`. Held-out problems are answered every 5 steps.
The figures do not depend on how busy the machine is, apart from `CPU ms` (of a step of the
learner).

A pair that is not shipped is made first, with seed 0, under `--cache`. Each result is kept there in
`results.jsonl`, so a table that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kept_results import KeptResults
from benchmarks.training_loop import TrainingLoop
from onstream.settings.load import load_settings
from onstream.workers.tiny_models.make import make

TASKS = ("reverse-text", "alphabet-sort", "arithmetic")
SHIPPED = {"reverse-text": Path("examples/reverse-text")}
GOAL = 0.95
INTERVAL = 5
SHOWN = (10, 20, 30, 40, 60)
WIDTH = 170  # characters; a file has no width of its own
PAGE = (
    "trainer.loss.teacher_tau=1.0",
    "trainer.loss.adv_tau=0.0",
    "orchestrator.verification.enabled=false",
    "inference.sampling.max_completion=16",
    "deployment.device=cpu",
)
"""The page's fourth snippet, with what it leaves to a pair this small."""
REWARDS_TOO = (
    "trainer.loss.teacher_tau=0.5",
    "trainer.loss.adv_tau=1.0",
    "orchestrator.verification.enabled=true",
)
LR = "trainer.optim.lr={}"
WARMUP = "trainer.optim.warmup={}"
TYPE = "trainer.optim.type={}"
STALE = "orchestrator.max_off_policy_steps={}"
GROUP = "orchestrator.group_size={}"
SCHEDULE = "trainer.optim.schedule={}"

Case = tuple[str, ...]


class Result(msgspec.Struct, frozen=True):
    """What one training came to. `scores` are exact-match shares by step; 0 is the start."""

    task: str
    seed: int
    steps: int
    case: Case
    scores: dict[int, float]
    teacher_kl: float  # mean of the last 5 steps
    cpu_ms: float  # median CPU time of a step of the learner

    @property
    def reached(self) -> int | None:
        """The first evaluated step at the goal."""
        return next((step for step, score in self.scores.items() if score >= GOAL), None)

    @property
    def lowest(self) -> float:
        """The lowest score less the start's."""
        return min(self.scores.values()) - self.scores[0]


def cases(*axes: Iterable[str]) -> list[Case]:
    """Every combination of one value of each axis."""
    return [tuple(values) for values in itertools.product(*axes)]


def each(template: str, *values: object) -> list[str]:
    """`template` with each of `values`."""
    return [template.format(value) for value in values]


GRIDS: dict[str, list[Case]] = {
    "rate": cases(each(TYPE, "adamw", "muon"), each(LR, 2.5e-4, 5e-4, 1e-3, 2e-3)),
    "warm-up": cases(each(TYPE, "adamw", "muon"), each(WARMUP, 0, 5, 10, 20)),
    "schedule": cases(
        each(TYPE, "adamw", "muon"),
        each(SCHEDULE, "constant", "linear", "cosine"),
        each(LR, 1e-3, 2e-3),
    ),
    "staleness": cases(each(TYPE, "adamw", "muon"), each(STALE, 0, 1, 2, 4)),
    "group": cases(each(TYPE, "adamw", "muon"), each(GROUP, 1, 4, 8, 16)),
    "rewards": [(*REWARDS_TOO, *case) for case in cases(each(TYPE, "adamw", "muon"))],
    "default": [()],
}


def main() -> None:
    torch.set_num_threads(1)
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--grid", choices=GRIDS, action="append", default=[])
    options.add_argument("--set", action="append", default=[], help="a case: NAME=VALUE,…")
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--cache", type=Path, default=Path("runs/tuning"))
    asked = options.parse_args()
    own = [tuple(case.split(",")) for case in asked.set]
    grids = asked.grid or ([] if own else list(GRIDS))
    chosen = [*own, *itertools.chain.from_iterable(GRIDS[name] for name in grids)]
    kept = KeptResults(asked.cache / "results.jsonl")
    table = new_table()
    for task, case in itertools.product(asked.tasks, dict.fromkeys(chosen)):
        results = [
            result_of(kept, task, seed, asked.steps, case, asked.cache)
            for seed in range(asked.seeds)
        ]
        table.add_row(task, " ".join(map(short, case)) or "defaults", *cells(results))
        Console(width=WIDTH).print(table)


def result_of(
    kept: KeptResults, task: str, seed: int, steps: int, case: Case, cache: Path
) -> Result:
    """The result of a case; it is trained where it is not kept yet."""
    run = {"task": task, "seed": seed, "steps": steps, "case": case}
    found = kept.get(
        run, lambda: msgspec.to_builtins(train(task, seed, steps, case, pair(task, cache)))
    )
    return msgspec.convert(found, Result, strict=False)


def pair(task: str, cache: Path) -> Path:
    """The directory of the task's teacher and student."""
    shipped = SHIPPED.get(task)
    if shipped is not None:
        return shipped
    made = cache / task
    if not (made / "student").exists():
        print(f"making the pair of {task}")
        make(task, made, seed=0)
    return made


def train(task: str, seed: int, steps: int, case: Case, models: Path) -> Result:
    """Train the pair in `models` and evaluate it on the way."""
    given = [
        f"model.name={models / 'student'}",
        f"teacher_inference.model.name={models / 'teacher'}",
        f"task.name={task}",
        f"run.seed={seed}",
        f"trainer.max_steps={steps}",
    ]
    settings = load_settings([], [*PAGE, *given, *case])
    loop = TrainingLoop(settings, ahead=settings.orchestrator.max_off_policy_steps)
    scores = {0: loop.exact()}
    divergences = []
    times = []
    for step in range(1, steps + 1):
        metrics = loop.step()
        divergences.append(metrics["teacher_kl"])
        times.append(metrics["learner_cpu_ms"])
        if step % INTERVAL == 0:
            scores[step] = loop.exact()
    return Result(
        task,
        seed,
        steps,
        case,
        scores,
        statistics.fmean(divergences[-INTERVAL:]),
        statistics.median(times),
    )


def new_table() -> Table:
    """The columns; each cell has the seeds in their order."""
    shown = [f"step {step}" for step in SHOWN]
    return Table("task", "settings", f"steps to {GOAL}", *shown, "lowest", "teacher_kl", "CPU ms")


def short(setting: str) -> str:
    """A setting without its section."""
    name, _, value = setting.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def cells(results: Sequence[Result]) -> list[str]:
    """One row's."""
    reached = [str(one.reached or "—") for one in results]
    shown = [_mean(one.scores.get(step) for one in results) for step in SHOWN]
    lowest = [f"{one.lowest:+.2f}" for one in results]
    divergence = statistics.fmean(one.teacher_kl for one in results)
    cpu = statistics.median(one.cpu_ms for one in results)
    return [" ".join(reached), *shown, " ".join(lowest), f"{divergence:.3f}", f"{cpu:.0f}"]


def _mean(scores: Iterable[Any]) -> str:
    known = [score for score in scores if score is not None]
    return f"{statistics.fmean(known):.3f}" if known else ""


if __name__ == "__main__":
    main()
