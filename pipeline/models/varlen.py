"""Attention by cumulative lengths: without masks. Its kernel for CUDA has never run on a GPU here.

Registered with transformers as `onstream_varlen`. One call reads a whole packed row: the queries
are the row as it is, and the keys of a completion are its prompt's and its own. On a CPU a
reference reads the same index arrays, a sequence at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from onstream.pipeline.models.packing import SharedPrefixRow

VARLEN = "onstream_varlen"
CAUSAL = (-1, 0)
"""A window over the whole past; where keys are more than queries, aligned at their ends."""
MORE_THAN_PLAIN = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What a family hands to its attention that is more than softmax(q·k)·v over the whole past."""


@dataclass(frozen=True)
class VarlenLayout:
    """The `CumulativeLengths` of a packed row, on the device."""

    keys: Tensor  # [K]
    query_ends: Tensor  # [S + 1], int32
    key_ends: Tensor  # [S + 1], int32
    longest_query: int
    longest_key: int


def varlen_layout_of(packed: SharedPrefixRow, device: torch.device) -> VarlenLayout:
    """The layout of `packed`, on `device`."""
    lengths = packed.cumulative
    return VarlenLayout(
        torch.from_numpy(lengths.keys).to(device),
        torch.from_numpy(lengths.query_ends).to(device),
        torch.from_numpy(lengths.key_ends).to(device),
        lengths.longest_query,
        lengths.longest_key,
    )


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: VarlenLayout,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, in the form in which transformers calls it.

    `query` is [1, heads, T, D], `key` and `value` are [1, kv heads, T, D]. Returns the outputs
    [1, T, heads, D], and no attention weights.

    Raises:
        ValueError: the layer's attention is more than that.
    """
    refuse_more_than_plain(others)
    queries = by_token(query)
    keys = by_token(key).index_select(0, layout.keys)
    values = by_token(value).index_select(0, layout.keys)
    attend = _on_cuda if query.is_cuda else _by_sequence
    return attend(queries, keys, values, layout, scaling)[None], None


def refuse_more_than_plain(others: Mapping[str, Any]) -> None:
    """Check that a layer hands nothing to its attention that would be left out.

    Raises:
        ValueError: it does.
    """
    for name in MORE_THAN_PLAIN:
        if others.get(name) is not None:
            raise ValueError(f"a layer's attention has {name}")


def by_token(states: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, heads, D]."""
    return states[0].transpose(0, 1)


def _on_cuda(
    queries: Tensor, keys: Tensor, values: Tensor, layout: VarlenLayout, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Autocast does not know this kernel, which takes 16 bits alone.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else values.dtype
    attended: Any = varlen_attn(
        queries.to(dtype),
        keys.to(dtype),
        values.to(dtype),
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        window_size=CAUSAL,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    outputs: Tensor = attended
    return outputs


def _by_sequence(
    queries: Tensor, keys: Tensor, values: Tensor, layout: VarlenLayout, scaling: float | None
) -> Tensor:
    """The same by plain attention, for CPUs: [T, heads, D]."""
    outputs = []
    query_ends = layout.query_ends.tolist()
    key_ends = layout.key_ends.tolist()
    for at in range(len(query_ends) - 1):
        own = slice(query_ends[at], query_ends[at + 1])
        seen = slice(key_ends[at], key_ends[at + 1])
        before = seen.stop - seen.start - (own.stop - own.start)
        places = torch.arange(seen.stop - seen.start)
        out = scaled_dot_product_attention(
            queries[own].transpose(0, 1),
            keys[seen].transpose(0, 1),
            values[seen].transpose(0, 1),
            attn_mask=places <= places[before:, None],
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask by transformers: the layout says which token sees which."""


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, _no_mask)
