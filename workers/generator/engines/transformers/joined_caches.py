"""Joins the caches that models' own code makes, so that their sequences are decoded together.

A cache is one for all rows of a forward pass. Rows that have fewer tokens than the longest get
padding before them, which the attention mask hides; states of linear attention and convolutions
have no length.

Shapes: B rows, K key/value heads, W tokens of a row, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

KNOWN_LAYERS = {
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}
"""What holds nothing but keys, values and states. A class derived from one may hold more."""


@dataclass
class CacheRows:
    """The cache of B rows; `width` is W, the tokens of the longest, and of padding and a row."""

    cache: Any
    width: int


def can_be_joined(cache: Any) -> bool:
    """Whether all that `cache` holds is known here."""
    return type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= KNOWN_LAYERS


def join(parts: Sequence[CacheRows]) -> CacheRows:
    """The rows of all `parts`, in their order. The caches of `parts` are used up."""
    width = max(part.width for part in parts)
    first = parts[0].cache
    for layers in zip(*(part.cache.layers for part in parts), strict=True):
        if isinstance(layers[0], LinearAttentionLayer):
            _join_states(layers)
        if isinstance(layers[0], DynamicLayer) and layers[0].is_initialized:
            _join_keys(layers, width)
    return CacheRows(first, width)


def drop_padding(rows: CacheRows, tokens: int) -> None:
    """Take the first `tokens` tokens off every row, all of which are padding there."""
    rows.width -= tokens
    for layer in rows.cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            kept = _kept(layer, rows.width)
            layer.keys = layer.keys[:, :, -kept:]
            layer.values = layer.values[:, :, -kept:]


def _join_keys(layers: Sequence[Any], width: int) -> None:
    kept = _kept(layers[0], width)
    layers[0].keys = torch.cat([_widened(layer.keys, kept) for layer in layers])
    layers[0].values = torch.cat([_widened(layer.values, kept) for layer in layers])


def _kept(layer: Any, width: int) -> int:
    """How many of `width` tokens `layer` keeps; it is told that it has seen so many."""
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return width
    layer.cumulative_length = width
    window: int = layer.sliding_window
    return min(width, window - 1)


def _widened(tensor: Tensor, width: int) -> Tensor:
    """[B, K, w, D] as [B, K, width, D], with zeros before what there is."""
    return pad(tensor, (0, 0, width - tensor.shape[2], 0))


def _join_states(layers: Sequence[Any]) -> None:
    for states in ("conv_states", "recurrent_states"):
        joined = getattr(layers[0], states)
        for number, state in joined.items():
            if state is not None:
                joined[number] = torch.cat([getattr(layer, states)[number] for layer in layers])
