"""A model's output layer: hidden states to logits, with what families do to the logits after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import text_config

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What configurations call the bound of the logits (Gemma 2, arXiv:2408.00118, section 2)."""


@dataclass(frozen=True)
class OutputHead:
    """logits = cap · tanh(scale · (hidden · weightᵀ + bias) / cap); without a cap, the scaled ones.

    Args:
        weight: [V, H].
        bias: [V].
        scale: of the logits (Granite, Cohere, MiniCPM).
        cap: what no logit exceeds; None: there is no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def out_features(self) -> int:
        """V."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [n, V] of `hidden` [n, H], multiplied in the precision of `hidden`."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def with_weight(self, weight: Tensor) -> OutputHead:
        """The same with `weight`, say of another precision or with fewer rows."""
        bias = None if self.bias is None else self.bias[: len(weight)]
        return OutputHead(weight, bias, self.scale, self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of `logits` by the product of hidden states and weight, elementwise.

        [n, V] where there is a cap, otherwise one number. `logits` stay as they are.
        """
        if self.cap is None:
            return self.scale
        return (1 - (logits / self.cap) ** 2) * self.scale


def head_of(model: PreTrainedModel) -> OutputHead:
    """The model's output layer, as its configuration describes it.

    Raises:
        UserError: it is not linear.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"the output layer of {model.config.name_or_path} is a {type(linear).__name__}",
            expected="a linear layer over the vocabulary",
            next_step="Use a causal language model of another family.",
        )
    config = text_config(model)
    return OutputHead(linear.weight, linear.bias, _scale(config), _cap(config))


def _scale(config: PretrainedConfig) -> float:
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        return 1 / float(divisor)
    if factor := getattr(config, "logit_scale", None):  # Cohere
        return float(factor)
    if width := getattr(config, "dim_model_base", None):  # MiniCPM
        return float(width / config.hidden_size)
    return 1.0


def _cap(config: PretrainedConfig) -> float | None:
    caps = (getattr(config, name, None) for name in CAPS)
    return next((float(cap) for cap in caps if cap), None)
