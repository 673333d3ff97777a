"""Attention over packed rows, in which completions share their prompt.

Linear layers see the row as it is; attention gathers its queries and keys from it. It is registered
with transformers as `onstream_shared_prefix`. The layout travels as a keyword argument through the
model's forward to each attention layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from onstream.pipeline.models.packing import AttentionCall, SharedPrefixRow

SHARED_PREFIX = "onstream_shared_prefix"


@dataclass(frozen=True)
class DeviceCall:
    """An `AttentionCall` on the device: flat places in the row, and the mask as sdpa takes it."""

    queries: Tensor  # [b·q]
    keys: Tensor  # [b·s]
    rows: int  # b
    mask: Tensor | None  # [b or 1, 1, q, s]


@dataclass(frozen=True)
class AttentionLayout:
    """How attention reads one packed row."""

    calls: tuple[DeviceCall, ...]
    output_index: Tensor  # [T], each token's place in the outputs of all calls, end to end


def layout_of(packed: SharedPrefixRow, device: torch.device) -> AttentionLayout:
    """The attention layout of `packed`, on `device`."""
    return AttentionLayout(
        tuple(_to_device(call, device) for call in packed.calls),
        torch.from_numpy(packed.output_index).to(device),
    )


def _to_device(call: AttentionCall, device: torch.device) -> DeviceCall:
    queries = torch.from_numpy(call.queries.reshape(-1)).to(device)
    keys = queries
    if call.keys is not call.queries:
        keys = torch.from_numpy(call.keys.reshape(-1)).to(device)
    mask = None
    if call.mask is not None:
        mask = torch.from_numpy(call.mask).to(device)[:, None]
    return DeviceCall(queries, keys, len(call.queries), mask)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: AttentionLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, in the form in which transformers calls it.

    `query` is [1, heads, T, D], `key` and `value` are [1, kv heads, T, D]. Returns the outputs
    [1, T, heads, D], and no attention weights.
    """
    grouped = query.shape[1] != key.shape[1]
    queries = _by_token(query)
    keys = _by_token(key)
    values = _by_token(value)
    outputs = []
    for call in layout.calls:
        out = scaled_dot_product_attention(
            _gather(queries, call.queries, call.rows),
            _gather(keys, call.keys, call.rows),
            _gather(values, call.keys, call.rows),
            attn_mask=call.mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=call.mask is None,
            enable_gqa=grouped,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return merged.index_select(0, layout.output_index)[None], None


def _by_token(states: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads, D]."""
    return states[0].transpose(0, 1)


def _gather(states: Tensor, places: Tensor, rows: int) -> Tensor:
    """[T, heads, D] -> [b, heads, q or s, D], at `places` [b·q or b·s]."""
    gathered = states.index_select(0, places)
    return gathered.view(rows, -1, *states.shape[1:]).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask by transformers: the layout says which token sees which."""


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, _no_mask)
