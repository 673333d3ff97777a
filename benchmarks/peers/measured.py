"""What a run is measured by, the same for all sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.usage import Usage
from onstream.settings.root import Settings

GOAL = 0.95
EVALUATE_EVERY = 5

Step = Mapping[str, Any]
"""`time` (its end, seconds since 1970), `elapsed_s`, `rollouts`, `tokens`."""


def rates(steps: Sequence[Step], usage: Usage, first: int, last: int = 0) -> dict[str, Any]:
    """Rollouts/s, tokens/s, CPU seconds a rollout and peak memory.

    Left out of the rates are the `first` steps, and the `last` ones: those of an asynchronous run
    train on rollouts while no new ones are written any more.

    Raises:
        ValueError: no step is left.
    """
    timed = steps[first : len(steps) - last]
    if not timed or not first:
        raise ValueError(
            f"{len(steps)} steps, of which {first} at the start and {last} at the end are not "
            "timed; expected at least one more, and one that is not timed at the start"
        )
    seconds = sum(step["elapsed_s"] for step in timed)
    rollouts = sum(step["rollouts"] for step in timed)
    cpu_s = usage.cpu_between(steps[first - 1]["time"], timed[-1]["time"])
    return {
        "timed_steps": len(timed),
        "rollouts_per_s": rollouts / seconds,
        "tokens_per_s": sum(step["tokens"] for step in timed) / seconds,
        "cpu_s_per_rollout": cpu_s / rollouts,
        "peak_bytes": usage.peak_bytes,
    }


def way_to_goal(steps: Sequence[Step], exact: Callable[[int], float]) -> dict[str, Any]:
    """The first evaluated step at the goal, and the seconds of training until then.

    `exact` evaluates the policy after a step; that is outside of the clock. Both are None where no
    step reaches the goal.
    """
    found = []
    seconds = 0.0
    for number, step in enumerate(steps, start=1):
        seconds += step["elapsed_s"]
        if number % EVALUATE_EVERY:
            continue
        found.append((number, exact(number)))
        if found[-1][1] >= GOAL:
            return {"steps_to_goal": number, "seconds_to_goal": seconds, "exact": found}
    return {"steps_to_goal": None, "seconds_to_goal": None, "exact": found}


def exact(policy: Path, settings: Settings) -> float:
    """The greedy exact-match share of a policy, whichever side made it."""
    # Only now: most of what a benchmark does needs no torch.
    from onstream.workers.evaluation.greedy import evaluate

    return float(evaluate(policy, settings)["exact"])
