"""Metrics of a step's rollouts: rewards, staleness, lengths, and where their time went. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, pstdev

from onstream.pipeline.records import Rollout, ids_array
from onstream.settings.stages import FIRST, STAGE_NAMES, WORK_STAGES
from onstream.workers.trainer.batches.batch_builder import TrainableUnit, oldest_version
from onstream.workers.trainer.maths.staleness import staleness

Metrics = dict[str, float | None]

LEARNER_METRICS = (
    "loss",
    "loss_policy",
    "loss_teacher",
    "loss_kl",
    "teacher_kl",
    "teacher_kl_k3",
    "entropy",
    "ratio_mean",
    "ratio_max",
    "mismatch_mean",
    "mismatch_max",
    "mismatch_fresh_mean",
    "mismatch_fresh_max",
    "mismatch_by_staleness",
    "masked_share",
    "tail_floored_share",
    "grad_norm",
    "lr",
    "tokens",
)
"""Metrics of a step that the learner computes.

None in a row where the loss or the teacher gives them no meaning.
"""


_LATENCIES = {stage: f"latency_{stage}_s" for stage in WORK_STAGES}
_QUEUES = {stage: f"queue_{stage}_s" for stage in STAGE_NAMES if stage != FIRST}


def rollout_metrics(batch: Sequence[TrainableUnit], version: int) -> Metrics:
    """Means over the live rollouts of `batch`, trained with the weights of `version`.

    None where there is nothing to average.
    """
    rollouts = [rollout for unit in batch for rollout in unit.rollouts]
    ages = [staleness(oldest_version(rollout), version) for rollout in rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "rollouts": len(rollouts),
        "reward": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        "unscored": sum(rollout.unscored is not None for rollout in rollouts),
        "staleness_mean": fmean(ages),
        "staleness_max": max(ages),
        "completion_tokens_mean": fmean(map(_completion_tokens, rollouts)),
        "truncated_share": fmean(rollout.finish_reason == "length" for rollout in rollouts),
        **_times(rollouts),
    }


def scored_shares(batch: Sequence[TrainableUnit]) -> dict[str, float] | None:
    """The share of the rollouts of `batch` that each teacher scored, by the teacher's name.

    None where no teacher scored any.
    """
    rollouts = [rollout for unit in batch for rollout in unit.rollouts]
    counts = Counter(rollout.scored_by for rollout in rollouts if rollout.scored_by is not None)
    return {name: count / len(rollouts) for name, count in sorted(counts.items())} or None


def drop_metrics(dropped: Mapping[str, int]) -> Metrics:
    """How many numbers settled untrained since the step before, from the counts by fate."""
    other = sum(count for fate, count in dropped.items() if fate not in ("stale", "dead"))
    return {
        "dropped_stale": dropped.get("stale", 0),
        "dropped_other": other,
        "dead": dropped.get("dead", 0),
    }


def _completion_tokens(rollout: Rollout) -> int:
    return sum(len(ids_array(sample.completion_ids)) for sample in rollout.samples)


def _times(rollouts: Iterable[Rollout]) -> Metrics:
    """Mean seconds that the rollouts spent in each stage, and waiting in the stream before it."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for timing in rollout.timings:
            if name := _LATENCIES.get(timing.stage):
                spent[name].append(timing.done - timing.taken)
        for earlier, later in pairwise(rollout.timings):
            if name := _QUEUES.get(later.stage):
                # Clocks of two machines differ: a wait may come out below zero.
                spent[name].append(max(0.0, later.taken - earlier.done))
    names = (*_LATENCIES.values(), *_QUEUES.values())
    return {name: fmean(spent[name]) if name in spent else None for name in names}
