"""The forward pass over packed rows: attention and hidden states.

Completions share their prompt in a packed row. Linear layers see the row as it is; attention
gathers its queries and keys from it. It is registered with transformers as
`onstream_shared_prefix`. The layout travels as a keyword argument through the model's forward to
each attention layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)

from onstream.pipeline.models import multimodal
from onstream.pipeline.models.multimodal import Features
from onstream.pipeline.models.packing import (
    AttentionCall,
    PrefixGroup,
    SharedPrefixRow,
    pack,
    share_prompts,
)
from onstream.pipeline.models.padded_rows import padded_hidden_states, single_rows

SHARED_PREFIX = "onstream_shared_prefix"
VARLEN = "onstream_varlen"
"""By cumulative lengths, without masks: `varlen.py`."""
MASKED_START_TOKENS = 2048
"""Under masks a common start is computed once where no sequence is longer: a mask has its square.

What reads the whole past of longer ones needs none, and is faster without.
"""
MORE_THAN_PLAIN = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What a family hands to its attention that is more than softmax(q·k)·v over the whole past."""
NO_IMAGES: Features = {}


def on_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor of `values`. The copy to a GPU does not wait for what that computes."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class AttentionLayout:
    """How attention reads one packed row, in C calls.

    Places in the row are those of all calls, end to end: gathered at once, their gradient is one
    tensor of the row, and not one for each call.
    """

    queries: Tensor  # [Σ b·q]
    keys: Tensor  # [Σ b·s]
    shapes: tuple[tuple[int, int, int], ...]  # [C], each b, q, s
    masks: tuple[Tensor | None, ...]  # [C], each [b or 1, 1, q, s], as sdpa takes it
    output_index: Tensor  # [T], each token's place in the outputs of all calls, end to end


def layout_of(packed: SharedPrefixRow, device: torch.device) -> AttentionLayout:
    """The attention layout of `packed`, on `device`."""
    calls = packed.calls
    return AttentionLayout(
        on_device(np.concatenate([call.queries.ravel() for call in calls]), device),
        on_device(np.concatenate([call.keys.ravel() for call in calls]), device),
        tuple((*call.queries.shape, call.keys.shape[1]) for call in calls),
        tuple(_mask(call, device) for call in calls),
        on_device(packed.output_index, device),
    )


def _mask(call: AttentionCall, device: torch.device) -> Tensor | None:
    return None if call.mask is None else on_device(call.mask, device)[:, None]


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
        on_device(lengths.keys, device),
        on_device(lengths.query_ends, device),
        on_device(lengths.key_ends, device),
        lengths.longest_query,
        lengths.longest_key,
    )


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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, in the form in which transformers calls it.

    `query` is [1, heads, T, D], `key` and `value` are [1, kv heads, T, D]. Returns the outputs
    [1, T, heads, D], and no attention weights.

    Raises:
        ValueError: the layer's attention is more than that.
    """
    refuse_more_than_plain(others)
    grouped = query.shape[1] != key.shape[1]
    rows = [b for b, _, _ in layout.shapes]
    queries = _gather(query, layout.queries, rows, [b * q for b, q, _ in layout.shapes])
    key_counts = [b * s for b, _, s in layout.shapes]
    keys = _gather(key, layout.keys, rows, key_counts)
    values = _gather(value, layout.keys, rows, key_counts)
    outputs = []
    for q, k, v, mask in zip(queries, keys, values, layout.masks, strict=True):
        out = attend(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=mask is None,
            enable_gqa=grouped,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return merged.index_select(0, layout.output_index)[None], None


def attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """`scaled_dot_product_attention`, on a CPU in float32 or more.

    Its backward pass in bfloat16 takes three times as long there, on processors with AMX too.
    """
    if query.is_cuda:
        return scaled_dot_product_attention(query, key, value, **how)
    precision = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (states.to(precision) for states in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        out = scaled_dot_product_attention(q, k, v, **how)
    return out.to(query.dtype)


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


def _gather(
    states: Tensor, places: Tensor, rows: Sequence[int], counts: Sequence[int]
) -> list[Tensor]:
    """[1, heads, T, D] -> for each call [b, heads, q or s, D], at its `counts` of the `places`."""
    gathered = by_token(states).index_select(0, places).split_with_sizes(list(counts))
    return [
        part.view(b, -1, *part.shape[1:]).transpose(1, 2)
        for part, b in zip(gathered, rows, strict=True)
    ]


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask by transformers: the layout says which token sees which."""


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, _no_mask)
AttentionMaskInterface.register(VARLEN, _no_mask)


def hidden_states(
    model: PreTrainedModel, packed: SharedPrefixRow, features: Features = NO_IMAGES
) -> Tensor:
    """The last hidden states [N, H] that predict `packed.targets`, in their order.

    Shared prompts, and the images in them, are computed once where `prompt_sharing.prepare` has
    switched the model to it. Other models take one padded row a sequence. `features` holds the
    images that the prompts show.
    """
    if not shares_prompts(model):
        return padded_hidden_states(model, packed, features)
    row: Tensor = model.base_model(  # the decoder, in every family that allows shared prompts
        input_ids=on_device(packed.input_ids, model.device)[None],
        use_cache=False,  # with a cache, packed rows are silently wrong, by nats
        layout=_layout_for(model, packed),
        **_positions_and_images(model, packed, features),
    ).last_hidden_state[0]
    return row.index_select(0, on_device(packed.predicted_at, model.device))


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model's text attention is the one that reads packed rows."""
    return _attention_of(model) in (SHARED_PREFIX, VARLEN)


def _attention_of(model: PreTrainedModel) -> str:
    attention: str = model.config.get_text_config()._attn_implementation
    return attention


def rows_for(
    model: PreTrainedModel,
    prompts: Sequence[npt.ArrayLike],
    completions: Sequence[npt.ArrayLike],
    images: Sequence[tuple[str, ...]] | None,
    max_tokens: int,
) -> list[SharedPrefixRow]:
    """Sequences as rows of at most `max_tokens`, in the form that the model's attention reads.

    Prompts are shared where it can. So is their common start: always by cumulative lengths, under
    masks where no sequence is longer than `MASKED_START_TOKENS`. `images` names those that each
    prompt shows; None: no prompt shows any.

    Raises:
        ValueError: a prompt or a completion is empty.
    """
    if not shares_prompts(model):
        return pack(single_rows(prompts, completions, images), max_tokens)
    groups = share_prompts(prompts, completions, images)
    share_start = _attention_of(model) == VARLEN or _longest(groups) <= MASKED_START_TOKENS
    return pack(groups, max_tokens, share_start=share_start)


def _longest(groups: Sequence[PrefixGroup]) -> int:
    """Tokens of the longest sequence."""
    lengths = [len(group.prompt_ids) + max(map(len, group.completions)) for group in groups]
    return max(lengths, default=0)


def plan_attention(model: PreTrainedModel, packed: SharedPrefixRow) -> None:
    """Find out how the model's attention reads `packed`, which keeps it for the forward pass."""
    if _attention_of(model) == VARLEN:
        _ = packed.cumulative
    elif shares_prompts(model):
        _ = packed.output_index


def _layout_for(model: PreTrainedModel, packed: SharedPrefixRow) -> AttentionLayout | VarlenLayout:
    """The layout that the model's attention reads."""
    if _attention_of(model) == VARLEN:
        return varlen_layout_of(packed, model.device)
    return layout_of(packed, model.device)


def _positions_and_images(
    model: PreTrainedModel, packed: SharedPrefixRow, features: Features
) -> dict[str, Tensor]:
    """The positions of a packed row's tokens, and the tensors of the images that it shows."""
    if any(group.images for group in packed.groups):
        tensors = multimodal.image_tensors(model, packed.groups, features)
        return {"position_ids": multimodal.packed_positions(model, packed, features), **tensors}
    return {"position_ids": on_device(packed.position_ids, model.device)[None]}
