"""Onstream beside TRL on this machine, in turn, at three sizes; `make bench-peers` runs it.

    python -m benchmarks.peers [--only a|b|c ...] [--rounds 3] [--seeds 0 1 2] [--json FILE]

First TRL is tried in several forms, and its best one is taken. Then come rounds of TRL, Onstream
and, at size a, Onstream without asynchrony (`orchestrator.max_off_policy_steps = 0`). Results of
single runs are kept in runs/peers/results.jsonl: a benchmark that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.kept_results import KeptResults, Result
from benchmarks.peers.runner import ONSTREAM_SIDES, Environment, RunFailed, Runner
from benchmarks.peers.sizes import SIZES, Size, TrlForm
from benchmarks.peers.sweep import Tried, best_form
from benchmarks.peers.table import Rounds, as_json, table_of

DIRECTORY = Path("runs/peers")
TRL_PYTHON = Path(".venv-peers/bin/python")
PACKAGES = ("torch", "transformers")
TRL_PACKAGES = ("trl", "mistral_common", *PACKAGES)
CORES = 2
WIDTH = 200  # characters; a file has no width of its own
SWEEP = -1
"""The round of a run that only serves to choose TRL's form."""
ASK_TRL = (
    "import json, sys, sysconfig; from importlib.metadata import version;"
    "found = {name: version(name) for name in sys.argv[1:]};"
    "print(json.dumps([sysconfig.get_path('purelib'), found]))"
)


class Benchmark:
    """The rounds of the sizes that were asked for, and what is told of them."""

    def __init__(self, options: argparse.Namespace, environment: Environment) -> None:
        self.options = options
        self.sizes = [SIZES[name] for name in options.only]
        self.tried: dict[str, Tried] = {}
        self.best: dict[str, TrlForm] = {}
        self.rounds: list[Rounds] = []
        self._left_s = sum(self._seconds(size) for size in self.sizes)
        self._runner = Runner(environment, KeptResults(DIRECTORY / "results.jsonl"), self._tell)

    def run(self) -> None:
        """All of it, one run after the other."""
        for size in self.sizes:
            print(f"\n== ({size.name}) {size.title}", flush=True)
            form, self.tried[size.name] = best_form(
                size,
                fast=partial(self._sweep, size, size.sweep_steps),
                whole=partial(self._sweep, size, size.steps["trl"]),
            )
            self.best[size.name] = form
            print(f"({size.name}) TRL's best form: {form}", flush=True)
            self.rounds.append(self._rounds(size, form))

    def _sweep(self, size: Size, steps: int, form: TrlForm) -> Result:
        """A run of the sweep. A form that fails, by a rate too high say, is not the best one."""
        try:
            return self._runner.trl(size, form, steps, self.options.seeds[0], SWEEP)
        except RunFailed as failure:
            print(f"({size.name}) TRL, {form}: failed; left out.\n{failure}", flush=True)
            return {"tokens_per_s": 0.0, "failed": str(failure)}

    def _rounds(self, size: Size, form: TrlForm) -> Rounds:
        sides = [side for side in size.steps if side in ONSTREAM_SIDES]
        results: dict[str, list[Result]] = {name: [] for name in ["TRL", *map(_title, sides)]}
        for round_ in range(self.options.rounds):
            seed = self.options.seeds[round_ % len(self.options.seeds)]
            results["TRL"].append(self._runner.trl(size, form, size.steps["trl"], seed, round_))
            for side in sides:
                results[_title(side)].append(self._runner.onstream(size, side, seed, round_))
        return Rounds(size, results)

    def minutes(self) -> dict[str, float]:
        """By size: about how long it takes if nothing is kept."""
        return {size.name: self._seconds(size) / 60 for size in self.sizes}

    def _seconds(self, size: Size) -> float:
        fastest: dict[str, TrlForm] = {form.objective: form for form in size.forms}
        sweep = size.seconds["sweep"] * len(size.forms)
        sweep += size.seconds["trl"] * len(size.sweep_of_rates(fastest))
        rounds: int = self.options.rounds
        return sweep + rounds * sum(size.seconds[side] for side in size.steps)

    def _tell(self, title: str, expected_s: float, result: Result) -> None:
        """A line on a run that was done, or kept."""
        self._left_s = max(0.0, self._left_s - expected_s)
        goal = ""
        if "steps_to_goal" in result:
            goal = ", .95 not reached"
            if result["steps_to_goal"]:
                goal = f", .95 at step {result['steps_to_goal']}"
                goal += f" ({result['seconds_to_goal']:.1f} s of training)"
        print(
            f"{title}: {result['rollouts_per_s']:.3g} rollouts/s, "
            f"{result['tokens_per_s']:,.0f} tokens/s over {result['timed_steps']} steps{goal}; "
            f"took {result['wall_s']:.0f} s; about {self._left_s / 60:.0f} minutes to go",
            flush=True,
        )


def _title(side: str) -> str:
    return "Onstream" if side == "onstream" else f"Onstream, {side}"


def main() -> None:
    """Measure and print."""
    options = parsed()
    found = environment()
    benchmark = Benchmark(options, found)
    announce(benchmark, found)
    try:
        benchmark.run()
    except RunFailed as failure:
        sys.exit(str(failure))
    Console(width=WIDTH).print(table_of(benchmark.rounds))
    print("Medians (least–largest) over the rounds; ratios are taken round by round.")
    for name, form in benchmark.best.items():
        print(f"({name}) TRL is the best of {len(benchmark.tried[name])} that were tried: {form}")
    if options.json:
        options.json.write_text(json.dumps(as_data(benchmark, found), indent=2) + "\n")


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--only", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one a round")
    options.add_argument("--json", type=Path, help="a file for the table, the runs and versions")
    return options.parse_args()


def environment() -> Environment:
    """The environments that are there.

    Raises:
        SystemExit: there is none with TRL.
    """
    if not TRL_PYTHON.exists():
        sys.exit(
            f"no {TRL_PYTHON}: run `make bench-peers` in the repository's root, which makes it"
        )
    asked = subprocess.run([TRL_PYTHON, "-c", ASK_TRL, *TRL_PACKAGES], capture_output=True)
    packages, trl = json.loads(asked.stdout)
    machine = {"cores": str(bind_to_cores()), "python": platform.python_version()}
    own = {name: version(name) for name in PACKAGES}
    return Environment(
        trl_python=TRL_PYTHON,
        packages=Path(packages),
        pairs=DIRECTORY / "pair",
        versions={"trl": trl | machine, "onstream": own | machine | {"commit": commit()}},
    )


def bind_to_cores() -> int:
    """Keep this process, and all that it starts, to two cores; how many there are then."""
    if not hasattr(os, "sched_setaffinity"):  # macOS has none
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    return len(os.sched_getaffinity(0))


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def announce(benchmark: Benchmark, found: Environment) -> None:
    """What will be done, with which versions, and how long it takes."""
    for side, versions in found.versions.items():
        print(f"{side}: {', '.join(f'{name} {value}' for name, value in versions.items())}")
    for size in benchmark.sizes:
        print(f"({size.name}) {size.title}; batches of {size.batch} in groups of {size.group}")
    minutes = benchmark.minutes()
    each = ", ".join(f"({name}) {value:.0f}" for name, value in minutes.items())
    print(f"This takes about {sum(minutes.values()):.0f} minutes on two idle cores: {each}.")
    print(f"Each run is kept in {DIRECTORY / 'results.jsonl'}, and not done again.", flush=True)


def as_data(benchmark: Benchmark, found: Environment) -> Mapping[str, Any]:
    """The table, the runs and the versions."""
    tried = {
        name: [{"form": str(form), **result} for form, result in forms]
        for name, forms in benchmark.tried.items()
    }
    return {
        "versions": found.versions,
        "tried": tried,
        "best": {name: str(form) for name, form in benchmark.best.items()},
        "sizes": as_json(benchmark.rounds),
    }


if __name__ == "__main__":
    main()
