"""Decodes from the cache that a model's own code makes.

Such a cache knows no padding and no slots, so sequences of one length share one: the rollouts of a
prompt that started together, and others as long.
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


class UnsupportedCache(Exception):
    """The model's code makes no cache that can be decoded from."""


@dataclass
class EqualLengthBatch:
    """Sequences of one length, and the model's cache of all but the last token of each."""

    rows: list[SequenceState]
    cache: Any


class OwnCacheDecoder:
    """Decodes from caches that the model's own code makes, one for sequences of one length.

    Args:
        model: whose cache can be asked to keep some of its rows.
        prefill_tokens: of new sequences in one forward pass; more only where one is longer.
    """

    def __init__(self, model: Any, prefill_tokens: int) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._in_space = has_spatial_positions(model)
        self._kinds = token_kinds_argument(model)
        taken = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._batches: list[EqualLengthBatch] = []

    def logits(self, rows: Sequence[SequenceState]) -> Tensor:
        known = {id(row) for batch in self._batches for row in batch.rows}
        found = [self._next(batch) for batch in self._batches]
        new = [row for row in rows if id(row) not in known]
        found += [self._start(part) for part in _of_one_length(new, self._prefill_tokens)]
        decoded = (row for batch in self._batches for row in batch.rows)
        places = {id(row): place for place, row in enumerate(decoded)}
        order = torch.tensor([places[id(row)] for row in rows], device=self._model.device)
        return torch.cat(found).index_select(0, order)

    def without(
        self, rows: Sequence[SequenceState], finished: Collection[int]
    ) -> list[SequenceState]:
        gone = {id(rows[place]) for place in finished}
        for batch in self._batches:
            kept = [place for place, row in enumerate(batch.rows) if id(row) not in gone]
            if kept and len(kept) < len(batch.rows):
                self._keep(batch.cache, kept)
            batch.rows = [batch.rows[place] for place in kept]
        self._batches = [batch for batch in self._batches if batch.rows]
        return [row for row in rows if id(row) not in gone]

    def forget(self) -> None:
        self._batches = []

    def _next(self, batch: EqualLengthBatch) -> Tensor:
        """Logits [B, V] after the last token of each of the batch's rows."""
        ids = [row.token_ids[-1:] for row in batch.rows]
        inputs: dict[str, Any] = {"past_key_values": batch.cache}
        if self._in_space:
            positions = [[row.length - 1 + row.shift] for row in batch.rows]
            inputs["position_ids"] = self._tensor(np.broadcast_to(positions, (3, len(ids), 1)))
        logits, batch.cache = self._forward(self._tensor(ids), inputs)
        return logits

    def _start(self, rows: list[SequenceState]) -> Tensor:
        """The same for `rows` of one length, which become a batch; equal ones go in once."""
        numbers: dict[Any, int] = {}
        source = [numbers.setdefault(_written(row), len(numbers)) for row in rows]
        distinct = list({_written(row): row for row in rows}.values())
        ids = self._tensor([_tokens(row) for row in distinct])
        logits, cache = self._forward(ids, self._first_inputs(distinct, ids))
        if source != list(range(len(distinct))):
            self._keep(cache, source)
        self._batches.append(EqualLengthBatch(rows, cache))
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


def _of_one_length(
    rows: Sequence[SequenceState], most_tokens: int
) -> Iterator[list[SequenceState]]:
    """`rows` in parts of one length, whose distinct sequences have `most_tokens` or are one.

    Prompts with images are parts of their own: images of different sizes are no batch everywhere.
    """
    kinds: dict[Any, list[SequenceState]] = {}
    for row in rows:
        shown = row.prompt if row.request.images else None
        kinds.setdefault((row.length, shown), []).append(row)
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
