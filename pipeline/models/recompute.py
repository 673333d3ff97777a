"""Recomputation: a layer keeps what it was given, and computes the rest anew in the backward pass.

A forward pass that is differentiated keeps many tensors of each layer. With recomputation it keeps
the layers' inputs alone, and each layer is computed once more when its gradient is due: less
memory, a third more work, and the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import base_of, resolve_dtype
from onstream.pipeline.models.memory import memory_plan
from onstream.pipeline.models.tokenizer import cached_first
from onstream.pipeline.models.trial import name_of
from onstream.settings.gpus import memory_share
from onstream.settings.root import Settings


def recomputes(settings: Settings, model: str | Path, device: torch.device) -> bool:
    """Whether the layers of `model` are recomputed on `device`, as `trainer.recompute` says."""
    if settings.trainer.recompute != "auto" or device.type == "cpu":
        return settings.trainer.recompute == "layer"
    config = cached_first(base_of(model) or model, "model", AutoConfig.from_pretrained)
    share = memory_share(settings, "trainer") or 1.0
    plan = memory_plan(
        settings,
        config.to_dict(),
        half=resolve_dtype(settings.trainer.dtype, device) == torch.bfloat16,
        device_bytes=share * torch.cuda.get_device_properties(device).total_memory,
    )
    return plan.recompute


def recompute_layers(model: PreTrainedModel, *, draws_random: bool) -> None:
    """Let every layer of `model` be recomputed in the backward pass, in place.

    transformers' own switch does nothing here: it needs a model in training mode, which would bring
    dropout. `draws_random` says that layers draw random numbers, which then are kept to be drawn
    again.

    Raises:
        UserError: the model's code names no layers that can be.
    """
    layers = list(outermost_layers(model))
    if not layers:
        raise UserError(
            f'trainer.recompute = "layer", and the code of {name_of(model)} names no layers for it',
            expected="a model whose layers transformers can recompute",
            next_step='Set trainer.recompute = "none", and lower trainer.microbatch if memory is '
            "short.",
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward, draws_random=draws_random)


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in `module` that transformers can recompute, none of them inside another."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from outermost_layers(child)


def _recomputed(forward: Callable[..., Any], *, draws_random: bool) -> Callable[..., Any]:
    keep = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws_random)

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return keep(forward, *args, **kwargs)

    return recomputed
