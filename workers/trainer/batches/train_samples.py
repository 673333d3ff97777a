"""The samples that the learner trains on, made from records, and whether they can be trained on.

Bytes become arrays, rewards become advantages. One bad value would spoil a whole step, so every
sample is checked before it is in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from onstream.pipeline.record_codec import ids_array, logprobs_array, mask_array
from onstream.pipeline.records import Ids, Logprobs, Mask, Rollout, Sample, Work
from onstream.settings.sections.losses import Loss
from onstream.settings.sections.orchestrator import VerificationSettings
from onstream.workers.trainer.batches.batch_builder import TrainableUnit
from onstream.workers.trainer.maths.scalars import (
    group_advantages,
    teacher_baselines,
    token_staleness,
)


@dataclass
class TrainSample:
    """One prompt and completion with all that its loss reads.

    P prompt tokens, C completion tokens, k teacher alternatives; the k of two samples may differ.
    Logprobs are in nats: the generator's at the sampling temperature, the teacher's at temperature
    1. No loss reads `staleness`; it is for the metrics.
    """

    prompt_ids: Ids  # [P]
    completion_ids: Ids  # [C]
    loss_mask: Mask  # [C]
    generator_logprobs: Logprobs  # [C]
    teacher_logprobs: Logprobs | None = None  # [C]
    teacher_top_ids: Ids | None = None  # [C, k]
    teacher_top_logprobs: Logprobs | None = None  # [C, k]
    teacher_tail_logprobs: Logprobs | None = None  # [C], None where an endpoint gave only the top k
    advantage: float = 0.0
    teacher_baseline: float = 0.0  # nats: the sampled reverse KL of the step's other samples
    group: int = 0
    temperature: float = 1.0
    staleness: Ids | None = None  # [C], steps; UNWRITTEN where no policy wrote
    images: tuple[str, ...] = ()  # the digests of those that the prompt shows, in order


@dataclass(frozen=True)
class LossFields:
    """Which fields of its samples a loss reads, read off its settings once."""

    generator: bool
    teacher: bool  # where a sample has them
    teacher_needed: bool
    top_k: int  # the most of the teacher's likeliest tokens of each position; 0: none
    least_top_k: int  # the least of what was sampled at temperature 1
    least_top_k_scaled: int  # the same at any other temperature

    @classmethod
    def of(cls, loss: Loss) -> LossFields:
        """Those that `loss` reads."""
        return cls(
            generator=loss.reads_generator,
            teacher=loss.reads_teacher,
            teacher_needed=loss.needs_teacher,
            top_k=loss.most_top_k if loss.needs_top_k else 0,
            least_top_k=loss.least_top_k(scaled=False),
            least_top_k_scaled=loss.least_top_k(scaled=True),
        )


def reward_out_of_bounds(record: Work, verification: VerificationSettings) -> str | None:
    """Why the reward of `record` cannot be trained on, in words; None where it can."""
    least = verification.min_reward
    most = verification.max_reward
    reward = record.reward if isinstance(record, Rollout) else None
    if reward is None or least <= reward <= most:
        return None
    return (
        f"the reward is {reward:g}; expected {least:g} to {most:g} "
        "(orchestrator.verification.min_reward and max_reward)"
    )


Decoded = list[TrainSample] | str
"""The samples of a rollout, without advantage and staleness; or why it cannot be trained on."""


class SampleDecoder:
    """Decodes each rollout once, and keeps its samples until it has settled.

    Args:
        group_size: members of a group.
        check: raises ValueError for a sample that no step could take.
        ahead: whether a thread decodes rollouts before their turn comes.
    """

    def __init__(
        self, *, group_size: int, check: Callable[[TrainSample], None], ahead: bool = False
    ) -> None:
        self.samples: dict[int, list[TrainSample]] = {}
        """Of the rollouts that can be trained on, by number."""
        self._decode = partial(_decoded, group_size=group_size, check=check)
        self._thread = ThreadPoolExecutor(1, "decode") if ahead else None
        self._begun: dict[int, Future[Decoded]] = {}

    def begin(self, rollouts: Iterable[Rollout]) -> None:
        """Begin to decode rollouts whose turn comes soon."""
        if self._thread is None:
            return
        for rollout in rollouts:
            if rollout.number not in self._begun:
                self._begun[rollout.number] = self._thread.submit(self._decode, rollout)

    def problem(self, rollout: Rollout) -> str | None:
        """Why `rollout` cannot be trained on, in words; None where it can."""
        begun = self._begun.pop(rollout.number, None)
        decoded = begun.result() if begun else self._decode(rollout)
        if isinstance(decoded, str):
            return decoded
        self.samples[rollout.number] = decoded
        return None

    def forget(self, number: int) -> None:
        """Forget the samples of a rollout that has settled."""
        self.samples.pop(number, None)

    def clear(self) -> None:
        """Forget every rollout."""
        self.samples.clear()
        self._begun.clear()

    def close(self) -> None:
        """End the thread."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)


def _decoded(rollout: Rollout, *, group_size: int, check: Callable[[TrainSample], None]) -> Decoded:
    group = (rollout.number - 1) // group_size
    if (rollout.group, rollout.group_size) != (group, group_size):
        return (
            f"it says group {rollout.group} of {rollout.group_size}; "
            f"its number belongs to group {group} of {group_size}"
        )
    if not rollout.samples:
        return "it has no samples"
    try:
        samples = [_train_sample(sample, rollout) for sample in rollout.samples]
        for sample in samples:
            check(sample)
    except ValueError as error:
        return str(error)
    return samples


def training_samples(
    batch: Sequence[TrainableUnit],
    decoded: Mapping[int, list[TrainSample]],
    loss: Loss,
    *,
    version: int,
) -> list[TrainSample]:
    """The samples of the live rollouts of `batch`, each with its rollout's advantage in its unit.

    `decoded` has them by number. The weights of `version` take the step; the staleness of the
    tokens counts from it. Where `loss` lowers its variance, and a sample has none of the teacher's
    alternatives, each has the baseline of its teacher term.
    """
    rollouts = []
    for unit in batch:
        rewards = [rollout.reward for rollout in unit.rollouts]
        advantages = group_advantages(rewards, normalize=loss.normalize_advantage)
        for rollout, advantage in zip(unit.rollouts, advantages, strict=True):
            samples = []
            for sample, one in zip(rollout.samples, decoded[rollout.number], strict=True):
                ages = token_staleness(sample.version_spans, len(one.loss_mask), version)
                staleness = np.array(ages, dtype=np.int32)
                samples.append(replace(one, advantage=advantage, staleness=staleness))
            rollouts.append(samples)
    samples = [sample for own in rollouts for sample in own]
    if any(sample.teacher_top_ids is None for sample in samples) and loss.lowers_variance:
        return _with_baselines(rollouts, loss.reverse_kl_clip)
    return samples


def _with_baselines(
    rollouts: Sequence[Sequence[TrainSample]], clip: float | None
) -> list[TrainSample]:
    """The samples of `rollouts`, each with the teacher's baseline by the other rollouts."""
    baselines = teacher_baselines([_trained_logprobs(samples) for samples in rollouts], clip)
    return [
        replace(sample, teacher_baseline=baseline)
        for samples, baseline in zip(rollouts, baselines, strict=True)
        for sample in samples
    ]


def _trained_logprobs(samples: Sequence[TrainSample]) -> tuple[list[float], list[float]]:
    """The generator's and the teacher's logprobs of the tokens of `samples` in the loss mask."""
    mask = np.concatenate([sample.loss_mask for sample in samples]).astype(bool)
    generator = np.concatenate([sample.generator_logprobs for sample in samples])
    # There in each: a loss with such a baseline needs them, and they have been checked.
    given = (sample.teacher_logprobs for sample in samples)
    teacher = np.concatenate([logprobs for logprobs in given if logprobs is not None])
    return generator[mask].tolist(), teacher[mask].tolist()


def with_equal_top(samples: Sequence[TrainSample]) -> tuple[list[Ids], list[Logprobs]] | None:
    """The ids and logprobs [C, k] of each sample's likeliest tokens, with the largest of their k.

    Where a sample has fewer, its last id stands again, so that no other token leaves its tail, with
    NaN for the logprob. None where no sample has any.
    """
    given = [one.teacher_top_ids for one in samples if one.teacher_top_ids is not None]
    if not given:
        return None
    most = max(ids.shape[1] for ids in given)
    widened = [_widened(sample, most) for sample in samples]
    return [ids for ids, _ in widened], [logprobs for _, logprobs in widened]


def _widened(sample: TrainSample, most: int) -> tuple[Ids, Logprobs]:
    ids = sample.teacher_top_ids
    logprobs = sample.teacher_top_logprobs
    if ids is None or logprobs is None:
        shape = (len(sample.completion_ids), most)
        return np.zeros(shape, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)
    missing = ((0, 0), (0, most - ids.shape[1]))
    if not missing[1][1]:
        return ids, logprobs
    return np.pad(ids, missing, mode="edge"), np.pad(logprobs, missing, constant_values=np.nan)


def worst_rollouts(
    batch: Sequence[TrainableUnit], losses: Mapping[int, float], most: int
) -> dict[int, float]:
    """Up to `most` rollouts of `batch` that spoiled its step, the worst first: number and loss.

    They are those whose loss is not finite, or, where all are, is at least half of the largest.

    Args:
        batch: the units of the step.
        losses: of its samples, by the places that `training_samples` gave them.
        most: how many to name at most.
    """
    sizes = _loss_sizes(batch, losses)
    limit = max(sizes.values(), default=0.0) / 2
    worst = sorted(sizes, key=lambda number: (-sizes[number], number))[:most]
    return {number: sizes[number] for number in worst if sizes[number] >= limit}


def _loss_sizes(batch: Sequence[TrainableUnit], losses: Mapping[int, float]) -> dict[int, float]:
    """|loss| of each rollout of `batch`, by number; infinite where it is not finite."""
    sizes: dict[int, float] = {}
    place = 0
    for rollout in (rollout for unit in batch for rollout in unit.rollouts):
        loss = sum(abs(losses.get(place + at, 0.0)) for at in range(len(rollout.samples)))
        place += len(rollout.samples)
        sizes[rollout.number] = loss if math.isfinite(loss) else math.inf
    return sizes


def _train_sample(sample: Sample, rollout: Rollout) -> TrainSample:
    return TrainSample(
        prompt_ids=ids_array(sample.prompt_ids),
        completion_ids=ids_array(sample.completion_ids),
        loss_mask=mask_array(sample.loss_mask),
        generator_logprobs=logprobs_array(sample.generator_logprobs),
        teacher_logprobs=_logprobs(sample.teacher_logprobs),
        teacher_top_ids=_top_ids(sample),
        teacher_top_logprobs=_top_logprobs(sample),
        teacher_tail_logprobs=_logprobs(sample.teacher_tail_logprobs),
        group=rollout.group,
        temperature=rollout.temperature,
        images=tuple(sample.images),
    )


def _logprobs(field: bytes | None) -> Logprobs | None:
    return None if field is None else logprobs_array(field)


def _top_ids(sample: Sample) -> Ids | None:
    field = sample.teacher_top_ids
    return None if field is None else ids_array(field).reshape(len(sample.loss_mask), -1)


def _top_logprobs(sample: Sample) -> Logprobs | None:
    field = sample.teacher_top_logprobs
    return None if field is None else logprobs_array(field).reshape(len(sample.loss_mask), -1)


def check_samples(samples: Sequence[TrainSample], fields: LossFields, vocabulary: int) -> None:
    """Make sure that a step can train on `samples`: one bad value would spoil the whole step.

    Values are looked at all at once: a call of numpy costs more than its look at a short array.

    Raises:
        ValueError: one of the `fields` of a sample is missing, has another length than the
            completion or is not finite; or an id is not in the vocabulary.
    """
    ids = []
    logprobs = []
    for sample in samples:
        _check_lengths(sample, fields)
        if fields.top_k:
            _check_top(sample, fields, vocabulary)
        ids += [one.ravel() for one in _ids_read(sample, fields)]
        logprobs += [getattr(sample, name).ravel() for name in _logprobs_read(sample, fields)]
    beyond = bool(ids) and np.concatenate(ids).view(np.uint32).max() >= vocabulary  # or below 0
    if beyond or (logprobs and not np.isfinite(np.concatenate(logprobs)).all()):
        for sample in samples:
            _check_values(sample, fields, vocabulary)


def _ids_read(sample: TrainSample, fields: LossFields) -> list[Ids]:
    read = [sample.prompt_ids, sample.completion_ids]
    if fields.top_k and sample.teacher_top_ids is not None:
        read.append(sample.teacher_top_ids)
    return read


def _logprobs_read(sample: TrainSample, fields: LossFields) -> list[str]:
    """The fields with logprobs that a loss reads of `sample`, or would if they were there."""
    read = ["generator_logprobs"] if fields.generator else []
    if fields.teacher_needed or (fields.teacher and sample.teacher_logprobs is not None):
        read.append("teacher_logprobs")
    if fields.top_k and sample.teacher_top_ids is not None:
        read.append("teacher_top_logprobs")
        if sample.teacher_tail_logprobs is not None:
            read.append("teacher_tail_logprobs")
    return read


def _check_lengths(sample: TrainSample, fields: LossFields) -> None:
    prompt = len(sample.prompt_ids)
    tokens = len(sample.completion_ids)
    if not tokens or not prompt:
        raise ValueError(
            f"{_name(sample)} has {prompt} prompt and {tokens} completion tokens; "
            "expected ≥ 1 of each"
        )
    if len(sample.loss_mask) != tokens:
        raise ValueError(
            f"{_name(sample)} has a loss mask of {len(sample.loss_mask)}; "
            f"expected its {tokens} completion tokens"
        )
    for name in _logprobs_read(sample, fields):
        logprobs: Logprobs | None = getattr(sample, name)
        if logprobs is None or len(logprobs) != tokens:
            count = "no" if logprobs is None else len(logprobs)
            raise ValueError(f"{_name(sample)} has {count} {name}; expected {tokens}, one a token")


def _check_top(sample: TrainSample, fields: LossFields, vocabulary: int) -> None:
    tokens = len(sample.completion_ids)
    most = min(fields.top_k, vocabulary - 1)
    least = fields.least_top_k if sample.temperature == 1 else fields.least_top_k_scaled
    least = min(least, most)
    ids = sample.teacher_top_ids
    logprobs = sample.teacher_top_logprobs
    if ids is None and logprobs is None and not least:
        return
    fits = [(tokens, k) for k in range(max(1, least), most + 1)]
    for name, found in (("teacher_top_ids", ids), ("teacher_top_logprobs", logprobs)):
        if (
            found is None
            or found.shape not in fits
            or (ids is not None and found.shape != ids.shape)
        ):
            fewer = "" if least == most else f", or fewer from {max(1, least)} on"
            raise ValueError(
                f"{_name(sample)} has {name} of shape {getattr(found, 'shape', None)}; "
                f"expected {(tokens, most)}{fewer}"
            )


def _check_values(sample: TrainSample, fields: LossFields, vocabulary: int) -> None:
    for ids in _ids_read(sample, fields):
        if ids.min() < 0 or ids.max() >= vocabulary:
            what = "teacher_top_ids" if ids is sample.teacher_top_ids else "the token ids"
            raise ValueError(
                f"{_name(sample)} has {what} {ids.min()} to {ids.max()}; "
                f"expected 0 to {vocabulary - 1}"
            )
    for name in _logprobs_read(sample, fields):
        if not np.isfinite(getattr(sample, name)).all():
            raise ValueError(f"{_name(sample)} has {name} that are not finite; expected nats, ≤ 0")


def _name(sample: TrainSample) -> str:
    return f"a sample of group {sample.group}"
