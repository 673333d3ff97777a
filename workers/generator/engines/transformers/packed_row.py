"""Which tokens the next forward pass takes, and where they lie in its packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onstream.pipeline.images import PromptImage
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.slot_cache import (
    ContinuationBlock,
    ForwardPass,
    PromptBlock,
    SlotCache,
)

Numbers = npt.NDArray[Any]  # of integers
PromptKey = tuple[bytes, tuple[str, ...]]


@dataclass
class SequenceState:
    """A request and what has been written of it. `spans` are (policy version, first token written
    by it).

    `space` [3, P] places the prompt's tokens in time, height and width, where the model does so and
    the prompt shows images.
    """

    request: GenerationRequest
    space: Numbers | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def prompt(self) -> PromptKey:
        """The prompt as something that can be compared and hashed: its ids, and the images that it
        shows.
        """
        return self.request.prompt_ids.tobytes(), tuple(
            image.file.digest for image in self.request.images
        )

    @property
    def shift(self) -> int:
        """What the positions of the completion are ahead of the count of tokens: an image takes
        fewer positions than tokens.
        """
        return 0 if self.space is None else int(self.space.max()) + 1 - self.space.shape[1]


@dataclass(frozen=True)
class PackedRow:
    """One packed row of T tokens: ids [1, T], and the index [n] of the token that each slot's next
    is drawn after.

    Positions are [1, T], or [3, 1, T] where a token of the row has a place in space. `images` are
    those that the row shows.
    """

    input_ids: Tensor
    position_ids: Tensor
    last: Tensor
    slots: ForwardPass
    images: list[PromptImage]


class RowPacker:
    """Gathers the pieces of a packed row, in order, on the model's device."""

    def __init__(self, cache: SlotCache, device: torch.device, dtype: torch.dtype) -> None:
        self._pass = ForwardPass(cache)
        self._device = device
        self._dtype = dtype
        self._ids: list[Numbers] = []
        self._positions: list[Numbers] = []  # [t] or [3, t] each
        self._images: list[PromptImage] = []
        self._tokens = 0

    def prompts(self, rows: Sequence[SequenceState], first: int) -> Numbers:
        """Put each distinct prompt of `rows`, which take the slots from `first` on, once; returns
        the last token's index for each row.
        """
        numbers: dict[PromptKey, int] = {}
        source = [numbers.setdefault(row.prompt, len(numbers)) for row in rows]
        distinct = list({row.prompt: row for row in rows}.values())
        sizes = np.array([len(row.request.prompt_ids) for row in distinct])
        longest = int(sizes.max())
        offsets = _ramps(np.zeros_like(sizes), sizes)
        self._put(
            np.concatenate([row.request.prompt_ids for row in distinct]),
            _prompt_positions(distinct, offsets),
        )
        self._images += [image for row in distinct for image in row.request.images]
        self._pass.prompts = PromptBlock(
            tokens=self._tokens,
            count=len(distinct),
            longest=longest,
            cells=self._index(offsets + np.repeat(np.arange(len(sizes)) * longest, sizes)),
            first=first,
            last=first + len(rows),
            source=self._index(source),
        )
        return np.cumsum(sizes)[source] - 1

    def continuations(self, rows: Sequence[SequenceState], first: int, *, whole: bool) -> Numbers:
        """Put the last token of each of `rows`, in the slots from `first` on, or the `whole`
        completion; returns where each ends.
        """
        sizes = np.array([len(row.token_ids) if whole else 1 for row in rows])
        lengths = np.array([row.length for row in rows])
        begin = self._tokens
        longest = int(sizes.max())
        positions = _ramps(lengths - sizes, sizes)
        ids = [row.token_ids for row in rows] if whole else [row.token_ids[-1:] for row in rows]
        self._put(np.concatenate(ids), positions + np.repeat([row.shift for row in rows], sizes))
        number = np.repeat(np.arange(len(rows)), sizes)
        cells = _ramps(np.arange(len(rows)) * longest, sizes)
        queries = np.full(len(rows) * longest, int(lengths.max()))
        queries[cells] = positions
        block = ContinuationBlock(
            begin=begin,
            end=self._tokens,
            first=first,
            last=first + len(rows),
            longest=longest,
            slots=self._index(first + number),
            positions=self._index(positions),
            cells=None if longest == 1 else self._index(cells),
            bias=self._bias(queries.reshape(len(rows), longest), int(lengths.max())),
        )
        self._pass.continuations.append(block)
        return begin + np.cumsum(sizes) - 1

    def layout(self, last: Sequence[Numbers]) -> PackedRow:
        """The packed row; `last` as `prompts` and `continuations` returned it, in the order of the
        slots.
        """
        row = self._index(np.concatenate(self._ids))[None]
        return PackedRow(
            row,
            self._index(_together(self._positions)),
            self._index(np.concatenate(last)),
            self._pass,
            self._images,
        )

    def _put(self, ids: Numbers, positions: Numbers) -> None:
        self._ids.append(ids)
        self._positions.append(positions)
        self._tokens += len(ids)

    def _index(self, values: Sequence[int] | Numbers) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._device)

    def _bias(self, queries: Numbers, length: int) -> Tensor:
        """[rows, M, L]: 0 up to and including each query's own position, −inf after it."""
        hidden = torch.arange(length, device=self._device) > self._index(queries)[..., None]
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(
            hidden, -torch.inf
        )


def _prompt_positions(rows: Sequence[SequenceState], offsets: Numbers) -> Numbers:
    """Positions of the prompts of `rows`: `offsets` [t], or [3, t] where one of them has places in
    space.
    """
    if all(row.space is None for row in rows):
        return offsets
    counted = [
        np.broadcast_to(np.arange(len(row.request.prompt_ids)), (3, len(row.request.prompt_ids)))
        for row in rows
    ]
    return np.concatenate(
        [
            plain if row.space is None else row.space
            for row, plain in zip(rows, counted, strict=True)
        ],
        axis=1,
    )


def _together(positions: Sequence[Numbers]) -> Numbers:
    """[t] and [3, t] arrays as one: [1, T], or [3, 1, T] where one of them is in space."""
    if all(some.ndim == 1 for some in positions):
        return np.concatenate(positions)[None]
    return np.concatenate(
        [np.broadcast_to(some, (3, some.shape[-1])) for some in positions], axis=1
    )[:, None]


def _ramps(starts: Numbers, sizes: Numbers) -> Numbers:
    """For each start and size the numbers start, start + 1, … of that size, one after the other:
    [2, 7], [3, 1] → [2, 3, 4, 7].
    """
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ramps: Numbers = np.repeat(starts, sizes) + within
    return ramps


def lay_out(
    cache: SlotCache,
    rows: Sequence[SequenceState],
    settled: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PackedRow:
    """The pass that brings every slot to where its next token can be drawn.

    Args:
        rows: what runs in slots 0 … n−1. The first `settled` are in the cache but for their last
            token; the others are not in it at all, and of those, the ones that have been written to
            already come first.
    """
    cache.reserve(max(row.length for row in rows))
    again = settled + sum(bool(row.token_ids) for row in rows[settled:])
    packing = RowPacker(cache, device, dtype)
    fresh = (
        packing.prompts(rows[settled:], settled)[again - settled :]
        if settled < len(rows)
        else np.empty(0, np.int32)
    )
    last = []
    if settled:
        last.append(packing.continuations(rows[:settled], 0, whole=False))
    if again > settled:
        last.append(packing.continuations(rows[settled:again], settled, whole=True))
    return packing.layout([*last, fresh])
