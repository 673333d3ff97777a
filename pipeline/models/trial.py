"""What is found out about a model's code on short sequences, before any time is spent on long ones.

Short sequences show nothing of a window of thousands of tokens, so the window is made short for
them. What no short sequence shows is read from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import text_config

SHORT_WINDOW = 6
"""Tokens of a window in a trial, whose sequences are several times as long."""
WINDOWS = ("sliding_window", "attention_chunk_size", "sliding_window_size", "window_size")
"""What configurations and layers call the number of tokens that a layer sees back."""
FULL_ATTENTION = {"full_attention"}
ANOTHER_FAMILY = "Use a model of another family, such as Qwen, Llama or Mistral."
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest difference accepted, relative to the largest value. Wrong results are off by far more."""


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Let every window of `model` be `SHORT_WINDOW` tokens, for a trial.

    Some layers read it from the configuration, when they make the mask, and others keep it.
    """
    changed: list[tuple[Any, str, int]] = []
    holders = {id(holder): holder for holder in (text_config(model), *model.modules())}
    try:
        for holder in holders.values():
            for name in WINDOWS:
                tokens = vars(holder).get(name)
                if isinstance(tokens, int) and tokens > SHORT_WINDOW:
                    changed.append((holder, name, tokens))
                    setattr(holder, name, SHORT_WINDOW)
        yield
    finally:
        for holder, name, tokens in changed:
            setattr(holder, name, tokens)


def windows_of(config: PretrainedConfig) -> list[int]:
    """The windows, in tokens, that layers of a language model of this `config` see.

    Qwen's configurations name one that no layer uses.
    """
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False or set(kinds or ()) == FULL_ATTENTION:
        return []
    found = (getattr(config, name, None) for name in WINDOWS)
    return [window for window in found if isinstance(window, int) and window > 0]


def row_dependent_positions(config: PretrainedConfig) -> str | None:
    """The reason where a token's position in a row is encoded by the length of the whole batch.

    `config` is the language model's. A long neighbour then changes what a short sequence comes to.
    """
    if "longrope" in _rope_types(config):
        return 'its rotary positions are of the type "longrope", which depends on a row\'s length'
    return None


def partial_attention(config: PretrainedConfig) -> str | None:
    """The reason where some layers are not attention over the whole past; `config` names them.

    A trial alone might not show it: in a model that was never trained such layers do very little.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    window = getattr(config, "sliding_window", None)
    return f"its layers see {window} tokens back" if window and not kinds else None


def exact_context(config: PretrainedConfig) -> int | None:
    """The most tokens of a sequence that can be written token by token; None: there is no bound.

    `config` is the language model's. With `longrope` it is the length beyond which transformers
    encodes every position of the sequence anew: what was written before would no longer be what the
    whole sequence gives.
    """
    bounds = [
        one["original_max_position_embeddings"]
        for one in _ropes(config)
        if one["rope_type"] == "longrope"
    ]
    bounds.append(getattr(config, "max_position_embeddings", None))
    return min((bound for bound in bounds if bound is not None), default=None)


def _rope_types(config: PretrainedConfig) -> set[str]:
    return {one["rope_type"] for one in _ropes(config)}


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary positions' parameters; they are given once, or for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    by_kind = [one for one in given.values() if isinstance(one, dict)]
    return [one for one in (given, *by_kind) if "rope_type" in one]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its output layer: token ids to hidden states."""
    decoder: PreTrainedModel = model.base_model
    if decoder is model:  # Llama 4: the prefix of its weights is no attribute of the class
        decoder = model.model
    return decoder


def alone(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The hidden states [S, H] of one sequence [S], by the model's own code."""
    states: Tensor = decoder_of(model)(
        input_ids=input_ids.to(model.device)[None], use_cache=False
    ).last_hidden_state[0]
    return states


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether hidden states or logits are the same up to the rounding of `dtype`."""
    return bool((found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max())


@torch.no_grad()
def require_causal(model: PreTrainedModel, sequence: Tensor) -> None:
    """Check that no token of `sequence` [S] sees a later one.

    Raises:
        UserError: one does.
    """
    seen = len(sequence) // 2
    found = alone(model, sequence)[:seen]
    expected = alone(model, sequence[:seen])
    if agree(found, expected, model.dtype):
        return
    raise UserError(
        f"{name_of(model)} is not causal: what follows a token changes its hidden states, "
        f"by up to {(found - expected).abs().max():.2g}",
        expected="a causal language model, in which a token sees those before it alone",
        next_step=ANOTHER_FAMILY,
    )


def name_of(model: PreTrainedModel) -> str:
    """The model's name, and its family."""
    return f"{model.config.name_or_path} ({model.config.model_type})"
