"""From records to what the learner trains on: bytes become arrays, rewards become advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onstream.pipeline.records import (
    Ids,
    Logprobs,
    Rollout,
    Sample,
    ids_array,
    logprobs_array,
    mask_array,
)
from onstream.workers.trainer.batches.batch_builder import TrainableUnit
from onstream.workers.trainer.batches.train_sample import TrainSample
from onstream.workers.trainer.maths.advantages import group_advantages
from onstream.workers.trainer.maths.staleness import token_staleness


def untrainable(
    rollout: Rollout, *, group_size: int, check: Callable[[TrainSample], None]
) -> str | None:
    """Why `rollout` cannot be trained on, in words; None where it can.

    `check` raises ValueError for a sample that no step could take.
    """
    group = (rollout.number - 1) // group_size
    if (rollout.group, rollout.group_size) != (group, group_size):
        return (
            f"it says group {rollout.group} of {rollout.group_size}; "
            f"its number belongs to group {group} of {group_size}"
        )
    if not rollout.samples:
        return "it has no samples"
    try:
        for sample in rollout.samples:
            check(_train_sample(sample, rollout, advantage=0.0, version=0))
    except ValueError as error:
        return str(error)
    return None


def training_samples(
    batch: Sequence[TrainableUnit], *, normalize: bool, version: int
) -> list[TrainSample]:
    """The samples of the live rollouts of `batch`, each with its rollout's advantage in its unit.

    The weights of `version` take the step; the staleness of the tokens counts from it.
    """
    samples = []
    for unit in batch:
        rewards = [rollout.reward for rollout in unit.rollouts]
        advantages = group_advantages(rewards, normalize=normalize)
        for rollout, advantage in zip(unit.rollouts, advantages, strict=True):
            for sample in rollout.samples:
                samples.append(_train_sample(sample, rollout, advantage, version))
    return samples


def _train_sample(sample: Sample, rollout: Rollout, advantage: float, version: int) -> TrainSample:
    completion_ids = ids_array(sample.completion_ids)
    return TrainSample(
        prompt_ids=ids_array(sample.prompt_ids),
        completion_ids=completion_ids,
        loss_mask=mask_array(sample.loss_mask),
        generator_logprobs=logprobs_array(sample.generator_logprobs),
        teacher_logprobs=_logprobs(sample.teacher_logprobs),
        teacher_top_ids=_top_ids(sample),
        teacher_top_logprobs=_top_logprobs(sample),
        teacher_tail_logprobs=_logprobs(sample.teacher_tail_logprobs),
        advantage=advantage,
        group=rollout.group,
        temperature=rollout.temperature,
        images=tuple(sample.images),
        staleness=np.array(
            token_staleness(sample.version_spans, len(completion_ids), version), dtype=np.int32
        ),
    )


def _logprobs(field: bytes | None) -> Logprobs | None:
    return None if field is None else logprobs_array(field)


def _top_ids(sample: Sample) -> Ids | None:
    field = sample.teacher_top_ids
    return None if field is None else ids_array(field).reshape(len(sample.loss_mask), -1)


def _top_logprobs(sample: Sample) -> Logprobs | None:
    field = sample.teacher_top_logprobs
    return None if field is None else logprobs_array(field).reshape(len(sample.loss_mask), -1)
