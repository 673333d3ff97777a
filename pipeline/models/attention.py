"""Attention over packed rows: linear layers see the row as it is, attention gathers its own layout
from it.

Registered with transformers under the name `onstream_shared_prefix`; the layout travels as a
keyword argument through the model's forward to each attention layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from onstream.pipeline.models.packing import AttentionCall, PackedRow

SHARED_PREFIX = "onstream_shared_prefix"


@dataclass(frozen=True)
class DeviceCall:
    """An `AttentionCall` on the device: flat places in the row, and the mask as sdpa takes it."""

    queries: Tensor  # [b·q]
    keys: Tensor  # [b·s]
    rows: int
    mask: Tensor | None  # [b or 1, 1, q, s]


@dataclass(frozen=True)
class AttentionLayout:
    """How attention reads one packed row."""

    calls: tuple[DeviceCall, ...]
    output_index: Tensor  # [T]


def layout_of(packed: PackedRow, device: torch.device) -> AttentionLayout:
    """The attention layout of `packed`, on `device`."""
    return AttentionLayout(
        tuple(_to_device(call, device) for call in packed.calls),
        torch.from_numpy(packed.output_index).to(device),
    )


def _to_device(call: AttentionCall, device: torch.device) -> DeviceCall:
    queries = torch.from_numpy(call.queries.reshape(-1)).to(device)
    keys = (
        queries if call.keys is call.queries else torch.from_numpy(call.keys.reshape(-1)).to(device)
    )
    mask = None if call.mask is None else torch.from_numpy(call.mask).to(device)[:, None]
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
    """Attention of one packed row, in the form transformers calls it: query [1, heads, T, D], key
    and value [1, kv heads, T, D].

    Returns [1, T, heads, D], and no weights.
    """
    grouped = query.shape[1] != key.shape[1]
    rows = [_by_token(states) for states in (query, key, value)]
    outputs = []
    for call in layout.calls:
        q, k, v = (
            states.index_select(0, index).view(call.rows, -1, *states.shape[1:]).transpose(1, 2)
            for states, index in zip(rows, (call.queries, call.keys, call.keys), strict=True)
        )
        out = scaled_dot_product_attention(
            q,
            k,
            v,
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


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers builds no mask for this attention: the layout says what sees what."""


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, _no_mask)
