"""The objective, token by token: tensors in, tensors out. Logprobs are in nats and named by who
computed them.

docs/objective.md has the formulas with their signs and references. Every tensor is [N] over
loss-mask tokens unless its shape is given; every function returns one value a token, and the caller
sums and divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TrustRegion = Literal["signed", "symmetric", "none"]


@dataclass(frozen=True)
class PolicyTerms:
    """The parts of the policy loss; their sum is `loss`. `keep` is 1 where the trust region keeps a
    token.
    """

    reward: Tensor
    teacher: Tensor
    drift: Tensor
    keep: Tensor
    ratio: Tensor
    log_ratio: Tensor

    @property
    def loss(self) -> Tensor:
        """−keep · ratio · advantage + kl_tau · log_ratio²."""
        return self.reward + self.teacher + self.drift


def reverse_kl(
    trainer_logprobs: Tensor, teacher_logprobs: Tensor, clip: float | None = None
) -> Tensor:
    """trainer − teacher, both at temperature 1: the sampled-token estimate of KL(student ‖
    teacher), within ± `clip`.
    """
    difference = trainer_logprobs - teacher_logprobs
    return difference if clip is None else difference.clamp(-clip, clip)


def reverse_kl_k3(reverse_kl: Tensor) -> Tensor:
    """exp(−reverse_kl) − 1 + reverse_kl: never negative, of lower variance, and unbiased like the
    plain estimate.

    Schulman, "Approximating KL divergence" (2020), the estimator k3.
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
    """1 for tokens that train, 0 for those whose probability has already moved too far; both at the
    sampling temperature.

    `signed` drops a token that has risen by more than `high` and would be pushed up further, or
    fallen by more than `low` and would be pushed down further; `symmetric` drops on either bound
    whatever the sign; `none` keeps all.
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
    """−keep · ratio · advantage + kl_tau · log_ratio², split into what the reward, the teacher and
    the drift contribute.

    `trainer_logprobs` carries the gradient. `reward_advantage` is adv_tau · A, `teacher_advantage`
    is teacher_tau · (−reverse_kl); the advantage is their sum, and neither is differentiated. The
    ratio is bounded before any masking, so that no token, kept or not, can make inf · 0.
    """
    log_ratio = trainer_logprobs - generator_logprobs
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


def top_k_reverse_kl(
    student_top: Tensor, student_tail: Tensor, teacher_top: Tensor, teacher_tail: Tensor
) -> Tensor:
    """Σ s·(log s − log t) over the teacher's k likeliest tokens [N, k] and one tail bin [N], all
    logprobs at temperature 1.

    The student's logprobs carry the gradient. The tail bin makes the bins a distribution on both
    sides, so the term is never negative and cannot shrink by pushing mass out of the k.
    """
    student = torch.cat((student_top, student_tail[:, None]), dim=1)
    teacher = torch.cat((teacher_top, teacher_tail[:, None]), dim=1)
    return (student.exp() * (student - teacher)).sum(-1)


def tail_from_top(teacher_top: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The tail's logprob log(1 − Σ exp) [N] from the top k [N, k] alone, and 1 where it had to be
    floored.

    For endpoints that give only the k: rounding brings their sum to 1 or more in many positions of
    a confident teacher. `floor` is the least probability of the tail.
    """
    rest = 1 - teacher_top.double().exp().sum(-1)
    floored = rest < floor
    return rest.clamp(min=floor).log().to(teacher_top.dtype), floored.to(teacher_top.dtype)


def negative_log_likelihood(trainer_logprobs: Tensor) -> Tensor:
    """−log p of each token [N]; at temperature 1, whatever it was sampled at."""
    return -trainer_logprobs
