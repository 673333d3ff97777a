"""The loss of one packed row, chunk by chunk, with the metrics that every loss has."""

from __future__ import annotations

import torch
from torch import Tensor

from onstream.settings.sections.losses import Loss
from onstream.workers.trainer.chunked_loss import TrainerLogprobs
from onstream.workers.trainer.losses.inputs import LossFunction, LossInputs
from onstream.workers.trainer.losses.row_tokens import RowTokens
from onstream.workers.trainer.maths.loss import reverse_kl, reverse_kl_k3, tail_from_top
from onstream.workers.trainer.maths.mismatch import MismatchTally
from onstream.workers.trainer.maths.per_sample_losses import PerSampleLosses
from onstream.workers.trainer.maths.step_metrics import StepMetrics


class StepValues:
    """What is collected over the rows of one step; `per_sample` where somebody asks for it."""

    def __init__(self, per_sample: PerSampleLosses | None = None) -> None:
        self.metrics = StepMetrics()
        self.mismatch = MismatchTally()
        self.per_sample = per_sample


class RowLoss:
    """The loss of a row's tokens, in the form in which `chunked_loss` calls it."""

    def __init__(
        self, settings: Loss, loss: LossFunction, tokens: RowTokens, step: StepValues
    ) -> None:
        self._settings = settings
        self._loss = loss
        self._tokens = tokens
        self._step = step

    def __call__(self, at: slice, trainer: TrainerLogprobs) -> Tensor:
        """The loss of the tokens `at`, [n]."""
        inputs = self._inputs(at, trainer)
        values = self._loss(inputs)
        metrics = self._step.metrics
        metrics.add({"entropy": trainer.entropy, "loss": values.loss, **values.means})
        metrics.add_maxima(values.maxima)
        self._add_teacher_kl(inputs)
        self._add_mismatch(inputs, at)
        if self._step.per_sample:
            self._step.per_sample.add(loss=values.loss)
        return values.loss

    def _inputs(self, at: slice, trainer: TrainerLogprobs) -> LossInputs:
        tokens = self._tokens
        return LossInputs(
            token_ids=tokens.targets.ids[at],
            trainer_logprobs=trainer.sampled,
            trainer_logprobs_unscaled=trainer.sampled_unscaled,
            entropy=trainer.entropy,
            advantage=tokens.advantage[at],
            generator_logprobs=_part(tokens.generator_logprobs, at),
            teacher_logprobs=_part(tokens.teacher_logprobs, at),
            teacher_top_logprobs=_part(tokens.teacher_top, at),
            teacher_tail_logprobs=self._teacher_tail(at),
            trainer_top_logprobs=trainer.top,
            trainer_tail_logprobs=trainer.tail,
        )

    def _teacher_tail(self, at: slice) -> Tensor | None:
        """The teacher's tail [n], computed from its top k where an endpoint gave none."""
        if self._tokens.teacher_top is None or self._tokens.teacher_tail is None:
            return None
        given = self._tokens.teacher_tail[at]
        computed, floored = tail_from_top(
            self._tokens.teacher_top[at], self._settings.teacher_tail_floor
        )
        missing = given.isnan()
        self._step.metrics.add({"tail_floored_share": missing * floored})
        return torch.where(missing, computed, given)

    def _add_teacher_kl(self, inputs: LossInputs) -> None:
        if inputs.teacher_logprobs is None:
            return
        kl = reverse_kl(inputs.trainer_logprobs_unscaled, inputs.teacher_logprobs)
        self._step.metrics.add({"teacher_kl": kl, "teacher_kl_k3": reverse_kl_k3(kl)})

    def _add_mismatch(self, inputs: LossInputs, at: slice) -> None:
        if inputs.generator_logprobs is None:
            return
        mismatch = (inputs.trainer_logprobs.detach() - inputs.generator_logprobs).abs()
        self._step.metrics.add({"mismatch_mean": mismatch})
        self._step.metrics.add_maxima({"mismatch_max": mismatch})
        self._step.mismatch.add(mismatch, self._tokens.staleness[at], self._tokens.ages)
        if self._step.per_sample:
            self._step.per_sample.add(mismatch=mismatch)


def _part(values: Tensor | None, at: slice) -> Tensor | None:
    return None if values is None else values[at]
