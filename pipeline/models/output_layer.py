"""The output layer of a model, as its configuration describes it."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import text_config
from onstream.pipeline.models.logprobs import OutputHead

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What configurations call the bound of the logits (Gemma 2, arXiv:2408.00118, section 2)."""


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
