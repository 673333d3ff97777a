"""Decodes many sequences in one packed row, from a slot cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from onstream.pipeline.models.loading import set_text_attention
from onstream.workers.generator.engines.transformers.decoder import image_tensors
from onstream.workers.generator.engines.transformers.decoding_step import step_input
from onstream.workers.generator.engines.transformers.sequence import SequenceState
from onstream.workers.generator.engines.transformers.slot_cache import ATTENTION, SlotCache


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
            **image_tensors(self._model, row.images),
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
