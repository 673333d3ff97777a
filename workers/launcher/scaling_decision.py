"""Which stage should have one more worker, and whether that one was worth it: numbers in, a
decision out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onstream.settings.stages import StageName

LEAST_GAIN = 1.1
"""What one more worker has to promise: so many times the rollouts."""
WORTH_IT = 0.4
"""The part of the promise that it has to keep: clearly less than half is little."""


@dataclass(frozen=True)
class Window:
    """What some steps in a row came to.

    `waited_for` are the shares of their time that the trainer waited for each stage, `cores_busy`
    the share of the time of this machine's cores that the run's processes used.
    """

    rollouts_per_s: float
    waited_for: Mapping[str, float]
    cores_busy: float


def one_more_worker(window: Window, workers: Mapping[StageName, int]) -> dict[StageName, float]:
    """Rollouts/s that one more worker of a stage may at most give, by the stages of `workers`.

    Where the trainer waits for a stage of n workers, n + 1 take 1 / (n + 1) of that off. The cores
    of this machine have no more time than they have: none comes out faster than they would be with
    all of it in use.
    """
    predicted = {}
    for stage, count in workers.items():
        saved = window.waited_for.get(stage, 0.0) / (count + 1)
        share = min(1.0, max(1.0 - saved, window.cores_busy))
        predicted[stage] = round(window.rollouts_per_s / share, 2)
    return predicted


def stage_to_grow(
    window: Window, workers: Mapping[StageName, int], candidates: Collection[StageName]
) -> StageName | None:
    """The candidate that one more worker promises most for; None where none promises enough."""
    predicted = one_more_worker(window, {stage: workers[stage] for stage in candidates})
    best = max(predicted, key=predicted.__getitem__, default=None)
    if best is None or predicted[best] < LEAST_GAIN * window.rollouts_per_s:
        return None
    return best


def was_worth_it(before: float, predicted: float, after: float) -> bool:
    """Whether a worker gave enough of the rollouts/s that were predicted beyond those before.

    >>> was_worth_it(before=64, predicted=120, after=118), was_worth_it(64, 120, 70)
    (True, False)
    """
    return after - before >= WORTH_IT * (predicted - before)


def has_threads(of_kind: int, computing: int, threads: int, cores: int) -> bool:
    """Whether one more worker that computes a model finds a core, and its `threads` theirs.

    There are `of_kind` like it, and `computing` that compute any model, with as many threads each.
    With one thread each it may share a core with those that wait; no kind has more than the cores.
    """
    return of_kind < cores and (threads == 1 or (computing + 1) * threads <= cores)
