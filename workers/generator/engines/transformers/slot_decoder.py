"""Decodes many sequences in one packed row, from a slot cache.

Each running sequence has one slot, and slots 0 … n−1 are always in use, so that decoding reads
views and copies no keys. All tokens of a pass lie in one packed row, so that linear layers see no
padding; only attention works in the layout of the slots. Grouped queries are folded into the query
axis, so that keys are never repeated per query head. Where many slots have one long prompt, its
keys and values are read from one of them for all.

Shapes: T packed tokens, n slots in use, g prompts, M the most new tokens of one slot or prompt, H
query heads, K key/value heads, D head dimension, L positions that are attended to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from onstream.pipeline.models.forward import MORE_THAN_PLAIN
from onstream.pipeline.models.loading import set_text_attention
from onstream.workers.generator.engines.transformers.decoder import image_tensors
from onstream.workers.generator.engines.transformers.decoding_step import (
    ContinuationBlock,
    ForwardPass,
    PromptBlock,
    SequenceState,
    SharedPrompts,
    step_input,
)

ATTENTION = "onstream_slots"
_FIRST_CAPACITY = 64


class UnsupportedAttention(Exception):
    """A layer needs something that slot attention does not compute."""


class SlotCache:
    """Keys and values [slots, K, capacity, D] of every layer, allocated when they are needed."""

    def __init__(self, slots: int, max_context: int | None) -> None:
        self._slots = slots
        self._bound = max_context
        self._capacity = min(_FIRST_CAPACITY, max_context or _FIRST_CAPACITY)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> int:
        """How many layers have used the cache."""
        return len(self._layers)

    def reserve(self, length: int) -> None:
        """Give every slot room for at least `length` tokens.

        The capacity doubles, so that a growing batch is copied only a few times.
        """
        if length <= self._capacity:
            return
        while self._capacity < length:
            self._capacity *= 2
        self._capacity = max(length, min(self._capacity, self._bound or self._capacity))
        for index, (keys, values) in self._layers.items():
            self._layers[index] = (self._grown(keys), self._grown(values))

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of layer `index`, with heads as `key` and `value` [1, K, T, D] have them."""
        if index not in self._layers:
            self._layers[index] = (self._empty(key), self._empty(value))
        return self._layers[index]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of slots `sources` over slots `targets`."""
        source = torch.tensor(sources)
        target = torch.tensor(targets)
        for layer in self._layers.values():
            for tensor in layer:
                used = tensor[:, :, :length]
                used[target.to(tensor.device)] = used[source.to(tensor.device)]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self._slots, like.shape[1], self._capacity, like.shape[3])

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self._capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    onstream_pass: ForwardPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed tokens over the slots, with the signature that transformers expects.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: none; what a query may attend to follows from `onstream_pass`.
        scaling: of the scores; 1/√D where it is None.
        dropout: not used.
        onstream_pass: which tokens belong to which slot.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        UnsupportedAttention: the layer is not plain causal attention, or the model does not pass
            `onstream_pass` on to it.
    """
    _refuse(onstream_pass, attention_mask, kwargs)
    assert onstream_pass is not None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = onstream_pass.cache.layer(layer, key, value)
    out = []
    if onstream_pass.prompts is not None:
        out.append(_attend_prompts(onstream_pass.prompts, q, k, v, keys, values, scale))
    for block in onstream_pass.continuations:
        attend = _attend_one if block.cells is None else _attend_many
        own = slice(block.begin, block.end)
        keys[block.slots, :, block.positions] = k[own]
        values[block.slots, :, block.positions] = v[own]
        out.append(attend(block, q[own], keys, values, scale))
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def _refuse(
    onstream_pass: ForwardPass | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    if onstream_pass is None or attention_mask is not None:
        raise UnsupportedAttention("the model does not pass keyword arguments on to its attention")
    for name in MORE_THAN_PLAIN:
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"a layer's attention has {name}")


def _grid(x: Tensor, cells: Tensor, rows: int, longest: int) -> Tensor:
    """Packed [t, heads, D] as [rows, heads, M, D], with zeros where there is no token."""
    grid = x.new_zeros(rows * longest, *x.shape[1:])
    grid[cells] = x
    return grid.view(rows, longest, *x.shape[1:]).transpose(1, 2)


def _attend_prompts(
    block: PromptBlock, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    # Padding is on the right, where a real token never attends, so it needs no mask. The zeros that
    # it leaves in the cache are overwritten before any query may attend to them.
    q, k, v = (_grid(x[: block.tokens], block.cells, block.count, block.longest) for x in (q, k, v))
    keys[block.first : block.last, :, : block.longest] = k[block.source]
    values[block.first : block.last, :, : block.longest] = v[block.source]
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)[block.cells]


def _attend_one(
    block: ContinuationBlock, q: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    rows = len(q)
    heads = q.shape[1]
    kv_heads = keys.shape[1]
    shared = block.shared
    start = shared.tokens if shared else 0
    own = slice(start, start + block.bias.shape[-1])
    k, v = (x[block.first : block.last, :, own].flatten(0, 1) for x in (keys, values))
    folded = q.reshape(rows * kv_heads, heads // kv_heads, -1)
    bias = block.bias if kv_heads == 1 else block.bias.repeat_interleave(kv_heads, dim=0)
    scores = torch.baddbmm(bias, folded, k.transpose(1, 2), alpha=scale)
    if shared:
        prompts = keys.transpose(2, 3)[..., :start]
        to_prompts = _by_prompt(shared, folded * scale, prompts)
        scores = torch.cat((to_prompts, scores), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    out = torch.bmm(weights[..., start:], v)
    if shared:
        out += _by_prompt(shared, weights[..., :start], values[:, :, :start])
    return out.reshape(rows, heads, -1)


def _by_prompt(shared: SharedPrompts, x: Tensor, prompts: Tensor) -> Tensor:
    """`x` [n·K, H/K, a] times what the cache [slots, K, a, b] has of each row's prompt.

    One product for each prompt and all its rows. Returns [n·K, H/K, b].
    """
    kv_heads = prompts.shape[1]
    ordered = x.reshape(-1, kv_heads, *x.shape[1:]).index_select(0, shared.order)
    products = []
    for leader, rows in zip(shared.leaders, ordered.split_with_sizes(shared.sizes), strict=True):
        product = torch.bmm(rows.transpose(0, 1).flatten(1, 2), prompts[leader])
        products.append(product.view(kv_heads, len(rows), x.shape[1], -1).transpose(0, 1))
    return torch.cat(products).index_select(0, shared.places).flatten(0, 1)


def _attend_many(
    block: ContinuationBlock, q: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    assert block.cells is not None
    rows = block.last - block.first
    longest = block.longest
    heads = q.shape[1]
    kv_heads = keys.shape[1]
    length = block.bias.shape[-1]
    k, v = (x[block.first : block.last, :, :length] for x in (keys, values))
    folded = _grid(q, block.cells, rows, longest).reshape(rows, kv_heads, -1, q.shape[-1])
    bias = block.bias[:, None, None].expand(-1, 1, heads // kv_heads, -1, -1).flatten(2, 3)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=bias, scale=scale)
    return out.reshape(rows, heads, longest, -1).transpose(1, 2).flatten(0, 1)[block.cells]


AttentionInterface.register(ATTENTION, slot_attention)


class SlotDecoder:
    """Decodes all sequences in one packed row, from a slot cache.

    The rows of a call lie in slots 0 … n−1, in their order. It sets the model's attention.

    Args:
        model: whose attention goes through the AttentionInterface.
        slots: the most rows.
        max_context: the most tokens of a row.
    """

    def __init__(self, model: Any, slots: int, max_context: int | None) -> None:
        self._model = model
        self._cache = SlotCache(slots, max_context)
        self._cached = 0  # the first slots, whose cache lacks only their last token
        set_text_attention(model, ATTENTION)

    @property
    def reads_slots(self) -> bool:
        """Whether a layer has used the cache; otherwise the model has its own attention."""
        return self._cache.layers > 0

    def logits(self, rows: Sequence[SequenceState]) -> Tensor:
        row = step_input(
            self._cache, rows, self._cached, device=self._model.device, dtype=self._model.dtype
        )
        output = self._model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            use_cache=False,
            logits_to_keep=row.last,
            onstream_pass=row.forward_pass,
            **(image_tensors(self._model, row.images) if row.images else {}),
        )
        self._cached = len(rows)
        logits: Tensor = output.logits[0]
        return logits

    def without(
        self, rows: Sequence[SequenceState], finished: Collection[int]
    ) -> list[SequenceState]:
        """The last slots move into the holes, so that slots 0 … n−1 are in use again."""
        left = len(rows) - len(finished)
        holes = sorted(slot for slot in finished if slot < left)
        movers = [slot for slot in range(left, len(rows)) if slot not in finished]
        if holes:
            self._cache.move(movers, holes, max(rows[slot].length for slot in movers))
        kept = list(rows[:left])
        for hole, mover in zip(holes, movers, strict=True):
            kept[hole] = rows[mover]
        self._cached = left
        return kept

    def forget(self) -> None:
        self._cached = 0
