"""TRL's best form at a size: by its speed, then by its way to the goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from benchmarks.kept_results import Result
from benchmarks.peers.sizes import Size, TrlForm

Tried = list[tuple[TrlForm, Result]]


def best_form(
    size: Size, fast: Callable[[TrlForm], Result], whole: Callable[[TrlForm], Result]
) -> tuple[TrlForm, Tried]:
    """The best form of `size`, and all that were tried.

    `fast` is a short run. Where the way to the goal counts, the fastest form of each objective is
    run `whole` at each learning rate and schedule, and the one with the fewest seconds to the goal
    is the best; the fastest one, where none gets there.
    """
    tried = [(form, fast(form)) for form in size.forms]
    fastest = fastest_of_each(tried)
    by_rate = [(form, whole(form)) for form in size.sweep_of_rates(fastest)]
    ranked = by_rate or tried
    best = min(ranked, key=lambda one: (seconds_to_goal(one[1]), -one[1]["tokens_per_s"]))
    return best[0], tried + by_rate


def fastest_of_each(tried: Tried) -> Mapping[str, TrlForm]:
    """By objective: the form with the most tokens/s."""
    slowest_first = sorted(tried, key=lambda one: one[1]["tokens_per_s"])
    return {form.objective: form for form, _ in slowest_first}


def seconds_to_goal(result: Result) -> float:
    """Infinite where the goal was not reached, or nobody looked."""
    seconds = result.get("seconds_to_goal")
    return inf if seconds is None else float(seconds)
