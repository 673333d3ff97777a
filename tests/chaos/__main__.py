"""The long run under blows, beside one that nothing happens to: `make chaos`, or `python -m
tests.chaos --seed 7`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.run import ChaosRun, Stuck
from tests.chaos.schedule import LONG, schedule
from tests.chaos.verdict import problems, summary

AS_GOOD = 0.05  # the share of right answers may be so much below that of the undisturbed run


def main() -> int:
    """Both runs, and what they came to; 0 if everything held."""
    options = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    options.add_argument(
        "--seed",
        type=int,
        default=random.randrange(10**6),
        help="draws the blows; by default another one each time",
    )
    options.add_argument(
        "--steps", type=int, default=80, help="steps of 128 rollouts; a multiple of 10"
    )
    options.add_argument(
        "--dir", type=Path, help="where the runs are kept; by default they are not"
    )
    options.add_argument("--alone", action="store_true", help="without the undisturbed run")
    chosen = options.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        try:
            return compared(
                chosen.dir or Path(directory), chosen.seed, chosen.steps, alone=chosen.alone
            )
        except Stuck as stuck:
            print(f"seed {chosen.seed}: {stuck}")
            return 1


def compared(directory: Path, seed: int, steps: int, *, alone: bool) -> int:
    """Run undisturbed and under blows; print the timeline, the audit and the result."""
    usual = None if alone else undisturbed(directory / "undisturbed", steps)
    began = time.monotonic()
    run = ChaosRun(
        directory / "chaos", steps=steps, eval_interval=10, say=lambda line: print(line, flush=True)
    )
    with run.running():
        run.through(schedule(seed, LONG, redis_kills=3, empty=1, steps=steps))
        wrong = problems(run)
        found = summary(run)
    print(
        "",
        f"seed {seed}, {time.monotonic() - began:.0f} s; what was done and when:",
        *run.timeline,
        "",
        sep="\n",
    )
    print(json.dumps({**found, "exact_undisturbed": usual}, indent=2))
    if usual is not None and (run.exact() or 0.0) < usual - AS_GOOD:
        wrong.append(f"the run came to {run.exact()} exact; undisturbed it comes to {usual}")
    print(*(f"WRONG: {words}" for words in wrong), sep="\n") if wrong else print("everything held")
    return 1 if wrong else 0


def undisturbed(directory: Path, steps: int) -> float | None:
    """What the run comes to when nothing happens to it."""
    run = ChaosRun(directory, steps=steps, eval_interval=steps, say=lambda line: None)
    print("the undisturbed run ...", flush=True)
    with run.running():
        run.through([])
    print(f"undisturbed: {run.exact()} exact", flush=True)
    return run.exact()


if __name__ == "__main__":
    sys.exit(main())
