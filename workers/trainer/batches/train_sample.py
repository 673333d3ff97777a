"""What one sample of a rollout brings to a training step, and whether it can be trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onstream.settings.sections.losses import Loss

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass
class TrainSample:
    """One prompt and completion with all that its loss reads.

    P prompt tokens, C completion tokens, k teacher alternatives. Logprobs are in nats: the
    generator's at the sampling temperature, the teacher's at temperature 1. No loss reads
    `staleness`; it is for the metrics.
    """

    prompt_ids: Ids  # [P]
    completion_ids: Ids  # [C]
    loss_mask: npt.NDArray[np.uint8]  # [C]
    generator_logprobs: Floats  # [C]
    teacher_logprobs: Floats | None = None  # [C]
    teacher_top_ids: Ids | None = None  # [C, k]
    teacher_top_logprobs: Floats | None = None  # [C, k]
    teacher_tail_logprobs: Floats | None = None  # [C], None where an endpoint gave only the top k
    advantage: float = 0.0
    group: int = 0
    temperature: float = 1.0
    staleness: Ids | None = None  # [C], steps; UNWRITTEN where no policy wrote
    images: tuple[str, ...] = ()  # the digests of those that the prompt shows, in order


def check_sample(sample: TrainSample, loss: Loss, vocabulary: int) -> None:
    """Make sure that a step can train on `sample`: one bad value would spoil the whole step.

    Raises:
        ValueError: a field that the loss reads is missing, has another length than the completion
            or is not finite; or an id is not in the vocabulary.
    """
    _check_ids(sample, vocabulary)
    if loss.needs_top_k:
        _check_top(sample, min(loss.teacher_top_k, vocabulary - 1), vocabulary)
    for name in _logprobs_read(sample, loss):
        _check_logprobs(sample, name, getattr(sample, name))


def _logprobs_read(sample: TrainSample, loss: Loss) -> list[str]:
    """The fields with logprobs that `loss` reads of `sample`, or would read if they were there."""
    read = []
    if loss.reads_generator:
        read.append("generator_logprobs")
    if loss.needs_teacher or (loss.reads_teacher and sample.teacher_logprobs is not None):
        read.append("teacher_logprobs")
    if loss.needs_top_k:
        read.append("teacher_top_logprobs")
        if sample.teacher_tail_logprobs is not None:
            read.append("teacher_tail_logprobs")
    return read


def _check_ids(sample: TrainSample, vocabulary: int) -> None:
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
    for ids in (sample.prompt_ids, sample.completion_ids):
        _check_in_vocabulary(sample, "the token ids", ids, vocabulary)


def _check_top(sample: TrainSample, top_k: int, vocabulary: int) -> None:
    expected = (len(sample.completion_ids), top_k)
    for name in ("teacher_top_ids", "teacher_top_logprobs"):
        found = getattr(sample, name)
        if found is None or found.shape != expected:
            shape = getattr(found, "shape", None)
            raise ValueError(f"{_name(sample)} has {name} of shape {shape}; expected {expected}")
    assert sample.teacher_top_ids is not None
    _check_in_vocabulary(sample, "teacher_top_ids", sample.teacher_top_ids, vocabulary)


def _check_in_vocabulary(sample: TrainSample, what: str, ids: Ids, vocabulary: int) -> None:
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"{_name(sample)} has {what} {ids.min()} to {ids.max()}; expected 0 to {vocabulary - 1}"
        )


def _check_logprobs(sample: TrainSample, name: str, logprobs: Floats | None) -> None:
    tokens = len(sample.completion_ids)
    if logprobs is None or len(logprobs) != tokens:
        count = "no" if logprobs is None else len(logprobs)
        raise ValueError(f"{_name(sample)} has {count} {name}; expected {tokens}, one a token")
    if not np.isfinite(logprobs).all():
        raise ValueError(f"{_name(sample)} has {name} that are not finite; expected nats, ≤ 0")


def _name(sample: TrainSample) -> str:
    return f"a sample of group {sample.group}"
