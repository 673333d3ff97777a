"""Decodes from the cache that a model's own code makes.

New sequences of one length go through the model together, equal ones once. Then they join those
that run: all sequences are decoded in one pass, the shorter ones behind padding. Where the model's
code is not exact with padding, only those of one length are; and each batch stays by itself where
the cache is of a kind that nothing here can join.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onstream.pipeline.models.multimodal import (
    has_spatial_positions,
    token_kinds,
    token_kinds_argument,
)
from onstream.workers.generator.engines.transformers.decoder import image_tensors
from onstream.workers.generator.engines.transformers.decoding_step import Integers, SequenceState
from onstream.workers.generator.engines.transformers.joined_caches import (
    CacheRows,
    can_be_joined,
    drop_padding,
    join,
)


class UnsupportedCache(Exception):
    """The model's code makes no cache that can be decoded from."""


@dataclass
class Batch:
    """Sequences, and the model's cache of all but the last token of each."""

    rows: list[SequenceState]
    cached: CacheRows

    def padding(self) -> Integers:
        """How many tokens of the cache come before each row, while its last token is not there."""
        return np.array([self.cached.width + 1 - row.length for row in self.rows])


class OwnCacheDecoder:
    """Decodes from caches that the model's own code makes.

    Args:
        model: whose cache can be asked to keep some of its rows.
        prefill_tokens: of new sequences in one forward pass; more only where one is longer.
        pads: decode sequences of all lengths together, else only those of one length.
    """

    def __init__(self, model: Any, prefill_tokens: int, *, pads: bool) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._pads = pads
        self._in_space = has_spatial_positions(model)
        self._kinds = token_kinds_argument(model)
        taken = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._takes_positions = "position_ids" in taken
        self._batches: list[Batch] = []

    def logits(self, rows: Sequence[SequenceState]) -> Tensor:
        known = {id(row) for batch in self._batches for row in batch.rows}
        found = [self._next(batch) for batch in self._batches]
        new = [row for row in rows if id(row) not in known]
        found += [self._start(part) for part in _of_one_length(new, self._prefill_tokens)]
        decoded = (row for batch in self._batches for row in batch.rows)
        places = {id(row): place for place, row in enumerate(decoded)}
        order = torch.tensor([places[id(row)] for row in rows], device=self._model.device)
        if new:
            self._join()
        return torch.cat(found).index_select(0, order)

    def without(
        self, rows: Sequence[SequenceState], finished: Collection[int]
    ) -> list[SequenceState]:
        gone = {id(rows[place]) for place in finished}
        for batch in self._batches:
            self._drop(batch, gone)
        self._batches = [batch for batch in self._batches if batch.rows]
        return [row for row in rows if id(row) not in gone]

    def forget(self) -> None:
        self._batches = []

    def _drop(self, batch: Batch, gone: Collection[int]) -> None:
        """Take the rows whose ids are in `gone` out of `batch`, and padding that is left over."""
        kept = [place for place, row in enumerate(batch.rows) if id(row) not in gone]
        if not kept or len(kept) == len(batch.rows):
            batch.rows = [batch.rows[place] for place in kept]
            return
        self._keep(batch.cached.cache, kept)
        batch.rows = [batch.rows[place] for place in kept]
        if unused := int(batch.padding().min()):
            drop_padding(batch.cached, unused)

    def _join(self) -> None:
        """Make one batch of those that can be decoded in one pass."""
        together: dict[Any, list[Batch]] = {}
        for batch in self._batches:
            key: Any = id(batch)
            if can_be_joined(batch.cached.cache):
                key = "any length" if self._pads else ("length", batch.cached.width)
            together.setdefault(key, []).append(batch)
        self._batches = [_joined(batches) for batches in together.values()]

    def _next(self, batch: Batch) -> Tensor:
        """Logits [B, V] after the last token of each of the batch's rows."""
        ids = [row.token_ids[-1:] for row in batch.rows]
        inputs = self._places(batch) | {"past_key_values": batch.cached.cache}
        logits, cache = self._forward(self._tensor(ids), inputs)
        batch.cached = CacheRows(cache, batch.cached.width + 1)
        return logits

    def _places(self, batch: Batch) -> dict[str, Any]:
        """Where the last tokens of the rows are, and which of the tokens before are padding."""
        inputs: dict[str, Any] = {}
        positions = np.array([[row.length - 1 + row.shift] for row in batch.rows])
        padding = batch.padding()
        if padding.any():
            there = np.arange(batch.cached.width + 1) >= padding[:, None]
            inputs["attention_mask"] = self._tensor(there)
        if self._in_space:
            inputs["position_ids"] = self._tensor(np.broadcast_to(positions, (3, len(padding), 1)))
        elif padding.any() and self._takes_positions:
            inputs["position_ids"] = self._tensor(positions)
        return inputs

    def _start(self, rows: list[SequenceState]) -> Tensor:
        """The same for `rows` of one length, which become a batch; equal ones go in once."""
        numbers: dict[Any, int] = {}
        source = [numbers.setdefault(_written(row), len(numbers)) for row in rows]
        distinct = list({_written(row): row for row in rows}.values())
        ids = self._tensor([_tokens(row) for row in distinct])
        logits, cache = self._forward(ids, self._first_inputs(distinct, ids))
        if source != list(range(len(distinct))):
            self._keep(cache, source)
        self._batches.append(Batch(rows, CacheRows(cache, rows[0].length)))
        return logits.index_select(0, self._tensor(source))

    def _first_inputs(self, rows: Sequence[SequenceState], ids: Tensor) -> dict[str, Any]:
        """What the model needs beside `ids` [B, S] to place the tokens of images."""
        images = [image for row in rows for image in row.request.images]
        inputs: dict[str, Any] = image_tensors(self._model, images)
        if self._in_space:
            positions = np.stack([_positions_in_space(row) for row in rows], axis=1)
            inputs["position_ids"] = self._tensor(positions)
        elif images and self._kinds is not None:
            inputs[self._kinds] = token_kinds(self._model, ids)
        return inputs

    def _forward(self, ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        output = self._model(input_ids=ids, use_cache=True, **self._last_only, **inputs)
        cache = getattr(output, "past_key_values", None)
        if not hasattr(cache, "reorder_cache"):
            raise UnsupportedCache("its code keeps none of transformers' kind")
        return output.logits[:, -1], cache

    def _keep(self, cache: Any, places: Sequence[int]) -> None:
        """Let the rows of `cache` be those at `places`, which may repeat one."""
        cache.reorder_cache(self._tensor(places))

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._model.device)


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all their rows."""
    if len(batches) == 1:
        return batches[0]
    rows = [row for batch in batches for row in batch.rows]
    return Batch(rows, join([batch.cached for batch in batches]))


def _of_one_length(
    rows: Sequence[SequenceState], most_tokens: int
) -> Iterator[list[SequenceState]]:
    """`rows` in parts of one length, whose distinct sequences have `most_tokens` or are one.

    The images of a part are of one size: others are no batch everywhere.
    """
    kinds: dict[Any, list[SequenceState]] = {}
    for row in rows:
        kinds.setdefault((row.length, _image_sizes(row)), []).append(row)
    for (length, _), alike in kinds.items():
        most = max(1, most_tokens // length)
        part: list[SequenceState] = []
        distinct = set[Any]()
        for row in alike:
            if len(distinct | {_written(row)}) > most:
                yield part
                part = []
                distinct = set()
            part.append(row)
            distinct.add(_written(row))
        yield part


def _image_sizes(row: SequenceState) -> tuple[torch.Size, ...]:
    images = row.request.images
    return tuple(tensor.shape for image in images for tensor in image.features.tensors.values())


def _written(row: SequenceState) -> Any:
    """What is equal for sequences of the same prompt and completion."""
    return row.prompt, tuple(row.token_ids)


def _tokens(row: SequenceState) -> Integers:
    return np.concatenate([row.request.prompt_ids, np.array(row.token_ids, dtype=np.int32)])


def _positions_in_space(row: SequenceState) -> Integers:
    """[3, S]: where the tokens of prompt and completion are in time, height and width."""
    positions = np.broadcast_to(np.arange(row.length) + row.shift, (3, row.length)).copy()
    if row.space is None:
        return positions
    positions[:, : row.space.shape[1]] = row.space
    return positions
