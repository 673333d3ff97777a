"""Frozen weights in bfloat16: 2 bytes a parameter for a model that is not trained itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

EXPERTS = 3
"""Dimensions of the weight of all experts of a layer in one."""


@torch.no_grad()
def round_frozen(model: PreTrainedModel) -> None:
    """Put into bfloat16, in place, what autocast multiplies in bfloat16 anyway.

    These are the weights of linear layers and of experts that require no gradient, and the input
    embedding. Norms and other small weights stay float32. So do the hidden states between the
    layers: each token's embedding is float32 again as soon as it is read. Where the model's files
    are bfloat16, nothing is rounded at all.
    """
    embedding = model.get_input_embeddings()
    as_it_is = None
    if type(embedding) is nn.Embedding:
        _round(embedding.weight)
        embedding.register_forward_hook(_in_float32)
    else:  # it computes with its weight, which may be the output layer's too
        as_it_is = embedding.weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not as_it_is:
            _round(module.weight, module.bias)
        elif not isinstance(module, nn.modules.conv._ConvNd):
            _round(*(one for one in module.parameters(recurse=False) if one.ndim == EXPERTS))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the float32 weights, in pieces that nothing else fits


def _round(*weights: Tensor | None) -> None:
    for weight in weights:
        if weight is not None and not weight.requires_grad and weight.dtype == torch.float32:
            weight.data = weight.data.to(torch.bfloat16)


def _in_float32(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
    return embedded.float()
