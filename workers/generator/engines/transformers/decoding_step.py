"""One decoding step: the sequences being written, and the packed row of their new tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onstream.pipeline.images import PromptImage
from onstream.pipeline.records import FinishReason, VersionSpan
from onstream.workers.generator.engines.base import Completion, GenerationRequest

Integers = npt.NDArray[Any]
PromptKey = tuple[bytes, tuple[str, ...]]
"""A prompt as something to compare and hash: its ids, and the digests of its images."""
SHORTEST_SHARED_TOKENS = 64
"""Prompts that are shorter are not read once for all their rows, however many those are."""
WORTH_SHARING_TOKENS = 1024
"""Keys that the rows of a prompt need not read, on average, so that reading it once is faster: it
costs calls of its own.
"""


@dataclass
class SequenceState:
    """A request and what has been written of it.

    `spans` are (policy version, index of the first token that it wrote). `space` [3, P] places the
    prompt's tokens in time, height and width, where the model does so and the prompt has images.
    """

    request: GenerationRequest
    space: Integers | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @cached_property
    def prompt(self) -> PromptKey:
        """What is equal for sequences of the same prompt."""
        digests = tuple(image.file.digest for image in self.request.images)
        return self.request.prompt_ids.tobytes(), digests

    @property
    def shift(self) -> int:
        """The completion's positions minus its token counts; an image takes fewer positions."""
        if self.space is None:
            return 0
        positions = int(self.space.max()) + 1
        tokens: int = self.space.shape[1]
        return positions - tokens

    def finish_reason(self, stop: Collection[int]) -> FinishReason | None:
        """Why it ends with its last token; None: it goes on. Any of `stop` ends it."""
        if self.token_ids[-1] in stop:
            return "stop"
        return "length" if len(self.token_ids) >= self.request.max_tokens else None

    def completion(self, reason: FinishReason) -> Completion:
        """What is handed back."""
        ends = [start for _, start in self.spans[1:]] + [len(self.token_ids)]
        spans = [
            VersionSpan(version, start, end)
            for (version, start), end in zip(self.spans, ends, strict=True)
            if end > start
        ]
        return Completion(
            key=self.request.key,
            token_ids=np.array(self.token_ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            finish_reason=reason,
            version_spans=spans,
        )


class KeyValueCache(Protocol):
    """Keys and values of every layer, by slot."""

    def reserve(self, length: int) -> None:
        """Give every slot room for at least `length` tokens."""
        ...

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of layer `index`, with heads as `key` and `value` [1, K, T, D] have them."""
        ...


@dataclass(frozen=True)
class PromptBlock:
    """The first `tokens` packed tokens: g whole prompts, for slots `first` … `last`−1.

    `count` is g and `longest` is M. `cells` [tokens] is each token's place in a [g, M] grid;
    `source` [last − first] is the prompt of each slot.
    """

    tokens: int
    count: int
    longest: int
    cells: Tensor
    first: int
    last: int
    source: Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """The start of the slots of a block, read once for all slots that have the same prompt.

    `tokens` is the length of that start. `leaders` are slots, one of each prompt, and `sizes` how
    many of the block's n rows have it. `order` [n] are the rows by prompt, and `places` [n] where
    each row is in that order.
    """

    tokens: int
    leaders: list[int]
    sizes: list[int]
    order: Tensor
    places: Tensor


@dataclass(frozen=True)
class ContinuationBlock:
    """Packed tokens `begin` … `end`−1: the new tokens of slots `first` … `last`−1, M each at most.

    `longest` is M. `slots` and `positions` [end − begin] are each token's place in the cache, and
    `cells` its place in a [last − first, M] grid; None when every slot adds exactly one. `bias`
    [last − first, M, L] is 0 where a query may attend, and −inf elsewhere; without the start that
    slots have in common, where they are `shared`.
    """

    begin: int
    end: int
    first: int
    last: int
    longest: int
    slots: Tensor
    positions: Tensor
    cells: Tensor | None
    bias: Tensor
    shared: SharedPrompts | None


@dataclass
class ForwardPass:
    """One forward pass over packed tokens: new prompts first, then continuations.

    Attention writes their keys and values to the cache.
    """

    cache: KeyValueCache
    prompts: PromptBlock | None = None
    continuations: list[ContinuationBlock] = field(default_factory=list)


@dataclass(frozen=True)
class StepInput:
    """One packed row of T tokens for a forward pass over n slots.

    Args:
        input_ids: [1, T].
        position_ids: [1, T], or [3, 1, T] where a token of the row has a place in space.
        last: [n], the index of the token after which each slot's next token is drawn.
        forward_pass: what attention needs.
        images: those of the row's prompts, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    last: Tensor
    forward_pass: ForwardPass
    images: list[PromptImage]


class RowPacker:
    """Gathers the parts of a packed row, in order, on the model's device."""

    def __init__(self, cache: KeyValueCache, device: torch.device, dtype: torch.dtype) -> None:
        self._pass = ForwardPass(cache)
        self._device = device
        self._dtype = dtype
        self._ids: list[Integers] = []
        self._positions: list[Integers] = []  # [t] or [3, t] each
        self._images: list[PromptImage] = []
        self._tokens = 0

    def prompts(self, rows: Sequence[SequenceState], first: int) -> Integers:
        """Add each distinct prompt of `rows` once.

        The rows take the slots from `first` on. Returns the index of the last token for each row.
        """
        numbers: dict[PromptKey, int] = {}
        source = [numbers.setdefault(row.prompt, len(numbers)) for row in rows]
        distinct = list({row.prompt: row for row in rows}.values())
        ids = [row.request.prompt_ids for row in distinct]
        sizes = np.array([len(prompt) for prompt in ids])
        longest = int(sizes.max())
        offsets = _ramps(np.zeros_like(sizes), sizes)
        grid_rows = np.repeat(np.arange(len(sizes)), sizes)
        self._pass.prompts = PromptBlock(
            tokens=int(sizes.sum()),
            count=len(distinct),
            longest=longest,
            cells=self._index(offsets + grid_rows * longest),
            first=first,
            last=first + len(rows),
            source=self._index(source),
        )
        self._add(np.concatenate(ids), _prompt_positions(distinct, offsets))
        self._images += [image for row in distinct for image in row.request.images]
        return np.cumsum(sizes)[source] - 1

    def continuations(self, rows: Sequence[SequenceState], first: int, *, whole: bool) -> Integers:
        """Add the last token of each of `rows`, or with `whole` its whole completion.

        The rows are in the slots from `first` on. Returns the index of the last token for each.
        """
        ids = [row.token_ids if whole else row.token_ids[-1:] for row in rows]
        sizes = np.array([len(tokens) for tokens in ids])
        lengths = np.array([row.length for row in rows])
        longest = int(sizes.max())
        most = int(lengths.max())
        positions = _ramps(lengths - sizes, sizes)
        begin = self._tokens
        shifts = np.repeat([row.shift for row in rows], sizes)
        self._add(np.concatenate(ids), positions + shifts)
        cells = _ramps(np.arange(len(rows)) * longest, sizes)
        queries = np.full(len(rows) * longest, most)
        queries[cells] = positions
        shared = None if whole else self._shared(rows, first)
        start = shared.tokens if shared else 0
        block = ContinuationBlock(
            begin=begin,
            end=self._tokens,
            first=first,
            last=first + len(rows),
            longest=longest,
            slots=self._index(first + np.repeat(np.arange(len(rows)), sizes)),
            positions=self._index(positions),
            cells=None if longest == 1 else self._index(cells),
            bias=self._bias(queries.reshape(len(rows), longest) - start, most - start),
            shared=shared,
        )
        self._pass.continuations.append(block)
        return begin + np.cumsum(sizes) - 1

    def step_input(self, last: Sequence[Integers]) -> StepInput:
        """The packed row.

        `last` is what `prompts` and `continuations` returned, in the order of the slots.
        """
        return StepInput(
            input_ids=self._index(np.concatenate(self._ids))[None],
            position_ids=self._index(_joined_positions(self._positions)),
            last=self._index(np.concatenate(last)),
            forward_pass=self._pass,
            images=self._images,
        )

    def _shared(self, rows: Sequence[SequenceState], first: int) -> SharedPrompts | None:
        """What is read once of the prompts of `rows`; None where that is not faster."""
        if self._device.type != "cpu":  # a GPU has calls to save, not reads
            return None
        if any(len(row.request.prompt_ids) < SHORTEST_SHARED_TOKENS for row in rows):
            return None
        tokens = min(len(row.request.prompt_ids) for row in rows)
        members = rows_by_prompt(rows)
        if (len(rows) - len(members)) * tokens < len(members) * WORTH_SHARING_TOKENS:
            return None
        order = np.concatenate(members)
        return SharedPrompts(
            tokens=tokens,
            leaders=[first + places[0] for places in members],
            sizes=[len(places) for places in members],
            order=self._index(order),
            places=self._index(np.argsort(order)),
        )

    def _add(self, ids: Integers, positions: Integers) -> None:
        self._ids.append(ids)
        self._positions.append(positions)
        self._tokens += len(ids)

    def _index(self, values: Sequence[int] | Integers) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._device)

    def _bias(self, queries: Integers, length: int) -> Tensor:
        """[rows, M, L]: 0 up to and including each query's own position, −inf after it."""
        hidden = torch.arange(length, device=self._device) > self._index(queries)[..., None]
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(hidden, -torch.inf)


def step_input(
    cache: KeyValueCache,
    rows: Sequence[SequenceState],
    cached: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> StepInput:
    """The pass that brings every slot to where its next token can be drawn.

    Args:
        cache: of keys and values; it is made to have room for `rows`.
        rows: what runs in slots 0 … n−1. The first `cached` are in the cache except for their last
            token. The others are not in it at all; of those, the ones with a completion come first.
        cached: how many rows the cache has.
        device: the model's.
        dtype: the model's.
    """
    cache.reserve(max(row.length for row in rows))
    # Rows cached … restarted−1 run again after new weights: prompt and completion are recomputed.
    restarted = cached + sum(bool(row.token_ids) for row in rows[cached:])
    packer = RowPacker(cache, device, dtype)
    new_last: Integers = np.empty(0, np.int32)
    if cached < len(rows):
        new_last = packer.prompts(rows[cached:], cached)[restarted - cached :]
    last = []
    if cached:
        last.append(packer.continuations(rows[:cached], 0, whole=False))
    if restarted > cached:
        last.append(packer.continuations(rows[cached:restarted], cached, whole=True))
    return packer.step_input([*last, new_last])


def rows_by_prompt(rows: Sequence[SequenceState]) -> list[list[int]]:
    """The places of the rows of each prompt that was computed by one version.

    Rows that keep what an older version computed share nothing with those that a newer one started.
    """
    members: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        members.setdefault((row.prompt, *row.spans[:1]), []).append(place)
    return list(members.values())


def _prompt_positions(rows: Sequence[SequenceState], offsets: Integers) -> Integers:
    """Positions of the prompts of `rows`: `offsets` [t], or [3, t] where one is in space."""
    if all(row.space is None for row in rows):
        return offsets
    positions = []
    for row in rows:
        count = len(row.request.prompt_ids)
        positions.append(_in_space(np.arange(count)) if row.space is None else row.space)
    return np.concatenate(positions, axis=1)


def _joined_positions(positions: Sequence[Integers]) -> Integers:
    """[t] and [3, t] arrays as one: [1, T], or [3, 1, T] where one of them is in space."""
    if all(some.ndim == 1 for some in positions):
        return np.concatenate(positions)[None]
    return np.concatenate([_in_space(some) for some in positions], axis=1)[:, None]


def _in_space(positions: Integers) -> Integers:
    """[t] or [3, t] as [3, t]: text has the same position in time, height and width."""
    return np.broadcast_to(positions, (3, positions.shape[-1]))


def _ramps(starts: Integers, sizes: Integers) -> Integers:
    """For each start and size the numbers start, start + 1, … of that size, one after the other.

    [2, 7] and [3, 1] give [2, 3, 4, 7].
    """
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ramps: Integers = np.repeat(starts, sizes) + within
    return ramps
