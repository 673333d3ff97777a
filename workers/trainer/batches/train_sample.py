"""What one rollout brings to a training step, and whether it can be trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onstream.settings.trainer import LossSettings

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass
class TrainSample:
    """One prompt and completion with all that its loss needs. P prompt tokens, C completion tokens,
    k teacher alternatives.

    Logprobs are in nats: the generator's at the sampling temperature, the teacher's at temperature
    1. `sft` reads neither. No loss reads `staleness`; it is for the metrics.
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


def check_sample(sample: TrainSample, loss: LossSettings, vocabulary: int) -> None:
    """Makes sure that a step can train on `sample`; one bad value would spoil the whole step.

    Raises:
        ValueError: a field is missing, has another length than the completion, is not finite, or an
            id is not in the vocabulary.
    """
    _check_ids(sample, vocabulary)
    if loss.type == "sft":
        return
    wanted: dict[str, Floats | None] = {"generator_logprobs": sample.generator_logprobs}
    if loss.teacher_tau or sample.teacher_logprobs is not None:
        wanted["teacher_logprobs"] = sample.teacher_logprobs
    if loss.teacher_tau and loss.teacher_top_k:
        wanted["teacher_top_logprobs"] = sample.teacher_top_logprobs
        if sample.teacher_tail_logprobs is not None:
            wanted["teacher_tail_logprobs"] = sample.teacher_tail_logprobs
        _check_top(sample, min(loss.teacher_top_k, vocabulary - 1), vocabulary)
    for name, logprobs in wanted.items():
        _check_logprobs(sample, name, logprobs)


def _check_ids(sample: TrainSample, vocabulary: int) -> None:
    tokens = len(sample.completion_ids)
    if not tokens or not len(sample.prompt_ids):
        raise ValueError(
            f"{_name(sample)} has {len(sample.prompt_ids)} prompt and {tokens} completion tokens; expected ≥ 1 of each"
        )
    if len(sample.loss_mask) != tokens:
        raise ValueError(
            f"{_name(sample)} has a loss mask of {len(sample.loss_mask)}; expected its {tokens} completion tokens"
        )
    for ids in (sample.prompt_ids, sample.completion_ids):
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"{_name(sample)} has the token ids {ids.min()} to {ids.max()}; expected 0 to {vocabulary - 1}"
            )


def _check_top(sample: TrainSample, top_k: int, vocabulary: int) -> None:
    expected = (len(sample.completion_ids), top_k)
    for name in ("teacher_top_ids", "teacher_top_logprobs"):
        found = getattr(sample, name)
        if found is None or found.shape != expected:
            raise ValueError(
                f"{_name(sample)} has {name} of shape {getattr(found, 'shape', None)}; expected {expected}"
            )
    ids = sample.teacher_top_ids
    if ids is not None and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(
            f"{_name(sample)} has teacher_top_ids {ids.min()} to {ids.max()}; expected 0 to {vocabulary - 1}"
        )


def _check_logprobs(sample: TrainSample, name: str, logprobs: Floats | None) -> None:
    if logprobs is None or len(logprobs) != len(sample.completion_ids):
        raise ValueError(
            f"{_name(sample)} has {'no' if logprobs is None else len(logprobs)} {name}; expected {len(sample.completion_ids)}, one a token"
        )
    if not np.isfinite(logprobs).all():
        raise ValueError(f"{_name(sample)} has {name} that are not finite; expected nats, ≤ 0")


def _name(sample: TrainSample) -> str:
    return f"a sample of group {sample.group}"
