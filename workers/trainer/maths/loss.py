"""The losses and their formulas, token by token: tensors in, tensors out.

docs/objective.md has them with their signs and references. Logprobs are in nats and named by who
computed them. Every tensor is [N] over loss-mask tokens unless its shape is given. Every function
returns one value a token; the caller sums and divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

TrustRegion = Literal["signed", "symmetric", "none"]
Divergence = Literal["reverse", "forward", "jsd"]


@dataclass(frozen=True)
class LossInputs:
    """N tokens of the loss mask. All but `token_ids` is float32; logprobs are in nats.

    `trainer_logprobs`, `trainer_top_logprobs` and `trainer_tail_logprobs` carry the gradient. A
    tensor that the loss does not need, by its settings, is None.

    A loss is called for a part of a step's tokens at a time: it must not depend on N, nor on other
    tokens of the call.
    """

    token_ids: Tensor
    """[N], int64: the tokens that were sampled."""
    trainer_logprobs: Tensor
    """[N], by the weights being trained: at the temperature of sampling where the loss reads the
    generator's logprobs, else at temperature 1."""
    trainer_logprobs_unscaled: Tensor
    """[N], the same at temperature 1, without gradient."""
    entropy: Tensor
    """[N], of the trainer's distribution at the temperature of `trainer_logprobs`, no gradient."""
    advantage: Tensor
    """[N], the rollout's reward less its group's mean; 0 where there is no reward."""
    generator_logprobs: Tensor | None = None
    """[N], by the policy version that sampled the token, at the temperature of sampling."""
    teacher_logprobs: Tensor | None = None
    """[N], by the teacher, at temperature 1."""
    teacher_baseline: Tensor | None = None
    """[N], the sampled reverse KL of the step's other samples; None: 0."""
    teacher_top_logprobs: Tensor | None = None
    """[N, k], the teacher's likeliest tokens, likeliest first, at temperature 1. With
    `teacher_top_k = "auto"` a token may have fewer: then the last ones are NaN."""
    teacher_tail_logprobs: Tensor | None = None
    """[N], all other tokens together, by the teacher."""
    trainer_top_logprobs: Tensor | None = None
    """[N, k], of the teacher's likeliest tokens, by the weights being trained, at temperature 1."""
    trainer_tail_logprobs: Tensor | None = None
    """[N], all other tokens together, by the weights being trained."""


@dataclass(frozen=True)
class LossValues:
    """What a loss makes of N tokens: `loss` [N], and values for the metrics, each [N].

    The metrics are the mean of each of `means` and the largest of each of `maxima`, over the step.
    """

    loss: Tensor
    means: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[LossInputs], LossValues]
"""A loss whose coefficients are given."""


def rl_loss(
    inputs: LossInputs,
    *,
    teacher_tau: float,
    teacher_divergence: Divergence,
    teacher_jsd_beta: float,
    adv_tau: float,
    kl_tau: float,
    reverse_kl_clip: float | None,
    trust_region: TrustRegion,
    trust_low: float,
    trust_high: float,
    max_log_ratio: float,
) -> LossValues:
    """`rl`: rewards and the teacher's judgement of the student's own tokens.

    The teacher's term of a token is the one over the teacher's likeliest tokens where they are
    given, else the sampled token's.
    """
    assert inputs.generator_logprobs is not None
    terms = policy_loss(
        inputs.trainer_logprobs,
        inputs.generator_logprobs,
        adv_tau * inputs.advantage,
        teacher_tau * _sampled_teacher_advantage(inputs, reverse_kl_clip),
        kl_tau=kl_tau,
        trust_region=trust_region,
        trust_low=trust_low,
        trust_high=trust_high,
        max_log_ratio=max_log_ratio,
    )
    teacher = terms.teacher
    if inputs.teacher_top_logprobs is not None:
        bins = _bins(inputs)
        over_bins = divergence(*bins, kind=teacher_divergence, beta=teacher_jsd_beta)
        teacher = teacher + teacher_tau * over_bins
    means = {
        "loss_policy": terms.reward,
        "loss_teacher": teacher,
        "loss_kl": terms.drift,
        "ratio_mean": terms.ratio,
        "masked_share": 1 - terms.keep,
    }
    return LossValues(terms.reward + teacher + terms.drift, means, {"ratio_max": terms.ratio})


def sft_loss(inputs: LossInputs) -> LossValues:
    """`sft`: −log p of each token at temperature 1, whatever it was sampled at."""
    return LossValues(negative_log_likelihood(inputs.trainer_logprobs))


def _sampled_teacher_advantage(inputs: LossInputs, clip: float | None) -> Tensor:
    """−reverse_kl [N], less its baseline, of the tokens in the sampled form; else 0."""
    trainer = inputs.trainer_logprobs_unscaled
    teacher = inputs.teacher_logprobs
    if teacher is None:
        return torch.zeros_like(trainer)
    sampled = reverse_kl(trainer, teacher, clip)
    if inputs.teacher_baseline is not None:
        sampled = sampled - inputs.teacher_baseline
    if inputs.teacher_top_logprobs is not None:
        sampled = sampled.where(inputs.teacher_top_logprobs[:, 0].isnan(), 0.0)
    return -sampled


def _bins(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The trainer's and the teacher's logprobs [N, k + 1] of the k likeliest tokens and the tail.

    The tail bin makes both a distribution. So a divergence over them is never negative, and cannot
    shrink by pushing probability out of the k. Bins that a token does not have are 0 in both, which
    adds nothing to a divergence.
    """
    assert inputs.trainer_top_logprobs is not None and inputs.trainer_tail_logprobs is not None
    assert inputs.teacher_top_logprobs is not None and inputs.teacher_tail_logprobs is not None
    student = torch.cat((inputs.trainer_top_logprobs, inputs.trainer_tail_logprobs[:, None]), dim=1)
    teacher = torch.cat((inputs.teacher_top_logprobs, inputs.teacher_tail_logprobs[:, None]), dim=1)
    missing = inputs.teacher_top_logprobs.isnan()
    missing = torch.cat((missing, missing[:, :1]), dim=1)  # without a first one there is no tail
    return student.masked_fill(missing, 0.0), teacher.masked_fill(missing, 0.0)


@dataclass(frozen=True)
class PolicyTerms:
    """The policy loss in its parts: it is `reward` + `teacher` + `drift`.

    `keep` is 1 where the trust region keeps a token, else 0.
    """

    reward: Tensor
    teacher: Tensor
    drift: Tensor
    keep: Tensor
    ratio: Tensor
    log_ratio: Tensor


def reverse_kl(
    trainer_logprobs: Tensor, teacher_logprobs: Tensor, clip: float | None = None
) -> Tensor:
    """trainer − teacher, both at temperature 1, within ± `clip`.

    On tokens that the student sampled it estimates KL(student ‖ teacher).
    """
    difference = trainer_logprobs - teacher_logprobs
    if clip is None:
        return difference
    return difference.clamp(-clip, clip)


def reverse_kl_k3(reverse_kl: Tensor) -> Tensor:
    """exp(−reverse_kl) − 1 + reverse_kl: the estimator k3 of the same divergence.

    It is unbiased like the plain one, of lower variance, and never negative. Schulman,
    "Approximating KL Divergence" (2020).
    """
    return torch.expm1(-reverse_kl) + reverse_kl


def keep_mask(
    advantage: Tensor,
    trainer_logprobs: Tensor,
    generator_logprobs: Tensor,
    *,
    trust_region: TrustRegion,
    low: float,
    high: float,
) -> Tensor:
    """1 for tokens that train, 0 for those whose probability has already moved too far.

    Both logprobs are at the sampling temperature. `signed` drops a token that has risen by more
    than `high` and would be pushed up further, or fallen by more than `low` and would be pushed
    down further. `symmetric` drops on either bound, whatever the sign. `none` keeps all.
    """
    if trust_region == "none":
        return torch.ones_like(advantage)
    moved = trainer_logprobs.exp() - generator_logprobs.exp()
    risen = moved > high
    fallen = moved < -low
    if trust_region == "signed":
        risen = risen & (advantage > 0)
        fallen = fallen & (advantage < 0)
    return (~(risen | fallen)).to(advantage.dtype)


def policy_loss(
    trainer_logprobs: Tensor,
    generator_logprobs: Tensor,
    reward_advantage: Tensor,
    teacher_advantage: Tensor,
    *,
    kl_tau: float,
    trust_region: TrustRegion,
    trust_low: float,
    trust_high: float,
    max_log_ratio: float,
) -> PolicyTerms:
    """−keep · ratio · advantage + kl_tau · log_ratio², in its three parts.

    `trainer_logprobs` carries the gradient. `reward_advantage` is adv_tau · A, `teacher_advantage`
    is teacher_tau · (−reverse_kl). The advantage is their sum, and neither is differentiated.
    """
    log_ratio = trainer_logprobs - generator_logprobs
    # Bounded before the mask is applied: a dropped token would otherwise make 0 · inf = NaN.
    ratio = log_ratio.clamp(max=max_log_ratio).exp()
    reward_advantage = reward_advantage.detach()
    teacher_advantage = teacher_advantage.detach()
    keep = keep_mask(
        reward_advantage + teacher_advantage,
        trainer_logprobs.detach(),
        generator_logprobs,
        trust_region=trust_region,
        low=trust_low,
        high=trust_high,
    )
    kept_ratio = keep * ratio
    return PolicyTerms(
        reward=-kept_ratio * reward_advantage,
        teacher=-kept_ratio * teacher_advantage,
        drift=kl_tau * log_ratio.square(),
        keep=keep,
        ratio=ratio.detach(),
        log_ratio=log_ratio.detach(),
    )


def divergence(student: Tensor, teacher: Tensor, *, kind: Divergence, beta: float) -> Tensor:
    """How far `student` is from `teacher` [N], both logprobs [N, bins] of distributions.

    - `reverse`: KL(s ‖ t) = Σ s·(log s − log t);
    - `forward`: KL(t ‖ s);
    - `jsd`: beta · KL(t ‖ m) + (1 − beta) · KL(s ‖ m) with m = beta·t + (1 − beta)·s, the
      generalised Jensen–Shannon divergence of Agarwal et al., "On-Policy Distillation of Language
      Models" (2024), equation 1.

    The student's carry the gradient.
    """
    if kind == "reverse":
        return _kl(student, teacher)
    if kind == "forward":
        return _kl(teacher, student)
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) [N] of logprobs [N, bins]."""
    return (p.exp() * (p - q)).sum(-1)


def tail_from_top(teacher_top: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The tail's logprob log(1 − Σ exp) [N] from the top k [N, k], and 1 where it was floored.

    It is for endpoints that give only the k. Their rounded sum comes to 1 or more in many positions
    of a confident teacher, so the tail's probability is at least `floor`. NaN stands for a token
    that was not given.
    """
    given = teacher_top.double().exp()
    rest = 1 - given.masked_fill(given.isnan(), 0.0).sum(-1)
    floored = rest < floor
    return rest.clamp(min=floor).log().to(teacher_top.dtype), floored.to(teacher_top.dtype)


def negative_log_likelihood(trainer_logprobs: Tensor) -> Tensor:
    """−log p of each token [N]; at temperature 1, whatever it was sampled at."""
    return -trainer_logprobs
