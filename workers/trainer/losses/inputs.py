"""What a loss is given of the tokens that train, and what it returns of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
    teacher_top_logprobs: Tensor | None = None
    """[N, k], the teacher's likeliest tokens, likeliest first, at temperature 1."""
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
