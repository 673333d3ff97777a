"""`trainer.loss.type = "rl"`: rewards and the teacher's judgement of the student's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from onstream.settings.sections.losses import RlLoss
from onstream.workers.trainer.losses.inputs import LossInputs, LossValues
from onstream.workers.trainer.maths.loss import policy_loss, reverse_kl, top_k_reverse_kl


def rl_loss(settings: RlLoss, inputs: LossInputs) -> LossValues:
    """The policy loss, and the teacher's term: sampled, or over its likeliest tokens."""
    assert inputs.generator_logprobs is not None
    terms = policy_loss(
        inputs.trainer_logprobs,
        inputs.generator_logprobs,
        settings.adv_tau * inputs.advantage,
        _teacher_advantage(settings, inputs),
        kl_tau=settings.kl_tau,
        trust_region=settings.trust_region,
        trust_low=settings.trust_low,
        trust_high=settings.trust_high,
        max_log_ratio=settings.max_log_ratio,
    )
    teacher = terms.teacher
    if inputs.teacher_top_logprobs is not None:
        teacher = settings.teacher_tau * _over_top_k(inputs)
    means = {
        "loss_policy": terms.reward,
        "loss_teacher": teacher,
        "loss_kl": terms.drift,
        "ratio_mean": terms.ratio,
        "masked_share": 1 - terms.keep,
    }
    return LossValues(terms.reward + teacher + terms.drift, means, {"ratio_max": terms.ratio})


def _teacher_advantage(settings: RlLoss, inputs: LossInputs) -> Tensor:
    """teacher_tau · (−reverse_kl) [N] in the sampled form; else 0."""
    trainer = inputs.trainer_logprobs_unscaled
    teacher = inputs.teacher_logprobs
    if teacher is None or inputs.teacher_top_logprobs is not None:
        return torch.zeros_like(trainer)
    return -settings.teacher_tau * reverse_kl(trainer, teacher, settings.reverse_kl_clip)


def _over_top_k(inputs: LossInputs) -> Tensor:
    """The reverse KL [N] over the teacher's likeliest tokens and the tail."""
    assert inputs.trainer_top_logprobs is not None and inputs.trainer_tail_logprobs is not None
    assert inputs.teacher_top_logprobs is not None and inputs.teacher_tail_logprobs is not None
    return top_k_reverse_kl(
        inputs.trainer_top_logprobs,
        inputs.trainer_tail_logprobs,
        inputs.teacher_top_logprobs,
        inputs.teacher_tail_logprobs,
    )
