"""Chooses the loss by the settings and feeds it the tokens of a packed row; counts the metrics on
the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onstream.pipeline.models.packing import Packed
from onstream.settings.trainer import LossSettings
from onstream.workers.trainer.batches.train_sample import TrainSample
from onstream.workers.trainer.maths.chunked_loss import Student, Wanted
from onstream.workers.trainer.maths.loss import (
    policy_loss,
    reverse_kl,
    reverse_kl_k3,
    sft_loss,
    tail_from_top,
    top_k_reverse_kl,
)
from onstream.workers.trainer.maths.mismatch import MismatchTally
from onstream.workers.trainer.maths.per_sample_losses import PerSampleLosses
from onstream.workers.trainer.maths.staleness import UNWRITTEN


class Tally:
    """Sums and maxima over the tokens of a step. They stay on the device until `means` reads them,
    all at once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self.mismatch = MismatchTally()

    def add(self, **values: Tensor) -> None:
        """Adds per-token values, each [n]."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def top(self, **values: Tensor) -> None:
        """Keeps the largest of per-token values, each [n]."""
        for name, value in values.items():
            largest = value.detach().max()
            self._maxima[name] = (
                torch.maximum(self._maxima[name], largest) if name in self._maxima else largest
            )

    def means(self, tokens: int) -> dict[str, float]:
        """The sums divided by `tokens`, and the maxima, by name."""
        names = [*self._sums, *self._maxima]
        values = torch.stack(
            [*self._sums.values(), *(largest.double() for largest in self._maxima.values())]
        ).tolist()
        return {
            name: value / tokens if name in self._sums else value
            for name, value in zip(names, values, strict=True)
        }


@dataclass(frozen=True)
class Tokens:
    """The loss-mask tokens of one packed row, N of them, as tensors. What a run does not have is
    None.
    """

    kept: Tensor | None  # [N], which of the row's targets they are; None: all
    wanted: Wanted
    generator_logprobs: Tensor | None
    advantage: Tensor
    teacher_logprobs: Tensor | None
    teacher_top: Tensor | None  # [N, k]
    teacher_tail: Tensor | None  # [N], NaN where it is to be computed from the top k
    staleness: Tensor  # [N]
    ages: tuple[int, ...]  # every staleness that a token has, of those that a policy wrote


def gather_tokens(
    packed: Packed, samples: Sequence[TrainSample], loss: LossSettings, device: torch.device
) -> Tokens:
    """The fields of `samples` in the order of the row's targets, without the tokens outside the
    loss mask.
    """
    members = [samples[sequence] for sequence in packed.sequences]
    mask = np.concatenate([sample.loss_mask for sample in members]).astype(bool)

    def tensor(values: Sequence[npt.NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(values)[mask]).to(device)

    def spread(values: Sequence[float]) -> Tensor:
        return torch.from_numpy(
            np.repeat(np.array(values, dtype=np.float32), packed.lengths)[mask]
        ).to(device)

    rl = loss.type == "rl"
    top_k = rl and loss.teacher_tau > 0 and loss.teacher_top_k > 0
    heated = rl and any(sample.temperature != 1.0 for sample in members)
    teacher = [
        sample.teacher_logprobs for sample in members if rl and sample.teacher_logprobs is not None
    ]
    ages = np.concatenate([_staleness(sample) for sample in members])[mask]
    tops = [
        sample.teacher_top_logprobs
        for sample in members
        if top_k and sample.teacher_top_logprobs is not None
    ]
    top_ids = [
        sample.teacher_top_ids for sample in members if top_k and sample.teacher_top_ids is not None
    ]
    return Tokens(
        kept=None if mask.all() else torch.from_numpy(mask.nonzero()[0]).to(device),
        wanted=Wanted(
            targets=torch.from_numpy(packed.targets[mask]).to(device),
            temperatures=spread([sample.temperature for sample in members]) if heated else None,
            top_ids=tensor(top_ids).long() if top_k else None,
        ),
        generator_logprobs=tensor([sample.generator_logprobs for sample in members])
        if rl
        else None,
        advantage=spread([sample.advantage for sample in members]),
        teacher_logprobs=tensor(teacher) if len(teacher) == len(members) else None,
        teacher_top=tensor(tops) if top_k else None,
        teacher_tail=tensor([_tail(sample) for sample in members]) if top_k else None,
        staleness=torch.from_numpy(ages).to(device),
        ages=tuple(int(age) for age in np.unique(ages) if age != UNWRITTEN),
    )


def _staleness(sample: TrainSample) -> npt.NDArray[np.int32]:
    """[C], `UNWRITTEN` everywhere where nobody said who wrote it."""
    if sample.staleness is not None:
        return sample.staleness
    return np.full(len(sample.completion_ids), UNWRITTEN, dtype=np.int32)


def _tail(sample: TrainSample) -> npt.NDArray[np.float32]:
    """The tail's logprobs, NaN where the teacher gave none."""
    if sample.teacher_tail_logprobs is not None:
        return sample.teacher_tail_logprobs
    return np.full(len(sample.completion_ids), np.nan, dtype=np.float32)


class Objective:
    """The loss of one packed row's tokens, in the form `chunked_loss` calls it."""

    def __init__(
        self,
        tokens: Tokens,
        loss: LossSettings,
        tally: Tally,
        per_sample: PerSampleLosses | None = None,
    ) -> None:
        self._tokens = tokens
        self._loss = loss
        self._tally = tally
        self._per_sample = per_sample

    def __call__(self, at: slice, student: Student) -> Tensor:
        """The loss of the tokens `at`, [n]."""
        self._tally.add(entropy=student.entropy)
        values = sft_loss(student.sampled) if self._loss.type == "sft" else self._rl(at, student)
        self._tally.add(loss=values)
        if self._per_sample:
            self._per_sample.add(loss=values)
        return values

    def _rl(self, at: slice, student: Student) -> Tensor:
        assert self._tokens.generator_logprobs is not None
        settings = self._loss
        generator = self._tokens.generator_logprobs[at]
        terms = policy_loss(
            student.sampled,
            generator,
            settings.adv_tau * self._tokens.advantage[at],
            self._teacher_advantage(at, student),
            kl_tau=settings.kl_tau,
            trust_region=settings.trust_region,
            trust_low=settings.trust_low,
            trust_high=settings.trust_high,
            max_log_ratio=settings.max_log_ratio,
        )
        teacher = (
            terms.teacher
            if self._tokens.teacher_top is None
            else settings.teacher_tau * self._bins(at, student)
        )
        mismatch = terms.log_ratio.abs()
        self._tally.add(loss_policy=terms.reward, loss_teacher=teacher, loss_kl=terms.drift)
        self._tally.add(ratio_mean=terms.ratio, mismatch_mean=mismatch, masked_share=1 - terms.keep)
        self._tally.top(ratio_max=terms.ratio, mismatch_max=mismatch)
        self._tally.mismatch.add(mismatch, self._tokens.staleness[at], self._tokens.ages)
        if self._per_sample:
            self._per_sample.add(mismatch=mismatch)
        return terms.reward + teacher + terms.drift

    def _teacher_advantage(self, at: slice, student: Student) -> Tensor:
        """teacher_tau · (−reverse_kl) where the sampled form is on, else 0; counts `teacher_kl` in
        either form.
        """
        if self._tokens.teacher_logprobs is None:
            return torch.zeros_like(student.sampled_unscaled)
        teacher = self._tokens.teacher_logprobs[at]
        unclipped = reverse_kl(student.sampled_unscaled, teacher)
        self._tally.add(teacher_kl=unclipped, teacher_kl_k3=reverse_kl_k3(unclipped))
        weight = 0.0 if self._tokens.teacher_top is not None else self._loss.teacher_tau
        return -weight * reverse_kl(student.sampled_unscaled, teacher, self._loss.reverse_kl_clip)

    def _bins(self, at: slice, student: Student) -> Tensor:
        assert student.top is not None and student.tail is not None
        assert self._tokens.teacher_top is not None and self._tokens.teacher_tail is not None
        top = self._tokens.teacher_top[at]
        given = self._tokens.teacher_tail[at]
        computed, floored = tail_from_top(top, self._loss.teacher_tail_floor)
        missing = given.isnan()
        self._tally.add(tail_floored_share=missing * floored)
        return top_k_reverse_kl(
            student.top, student.tail, top, torch.where(missing, computed, given)
        )
