"""Attention by cumulative lengths: without masks. Its kernel for CUDA has never run on a GPU here.

`prompt_sharing.py` registers it with transformers as `onstream_varlen`. One call reads a whole
packed row: the queries are the row as it is, and the keys of a completion are its prompt's and its
own. On a CPU a reference reads the same index arrays, a sequence at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from onstream.pipeline.models.forward import (
    VarlenLayout,
    by_token,
    refuse_more_than_plain,
)

CAUSAL = (-1, 0)
"""A window over the whole past; where keys are more than queries, aligned at their ends."""


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
