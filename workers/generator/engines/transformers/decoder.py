"""How the built-in engine comes to the logits of next tokens: from slots, or the model's own cache.

Slots are the fast way, for models that have nothing but full attention. The model's own cache is
whatever its code makes with `use_cache=True`: windows, states of linear attention and convolutions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import Tensor

from onstream.pipeline.images import PromptImage
from onstream.pipeline.models.multimodal import tensors_for
from onstream.workers.generator.engines.transformers.decoding_step import SequenceState


class Decoder(Protocol):
    """Gives the logits of next tokens, and remembers what it has computed of each sequence."""

    def logits(self, rows: Sequence[SequenceState]) -> Tensor:
        """[n, V] after the last token of each of `rows`.

        They are those of the last call, in the order that `without` gave them, each with one token
        more; after them come new ones, of which those that have a completion come first.
        """
        ...

    def without(
        self, rows: Sequence[SequenceState], finished: Collection[int]
    ) -> list[SequenceState]:
        """`rows` of the last call without those at the places `finished`, in their new order."""
        ...

    def forget(self) -> None:
        """Drop what was computed: the weights are others."""
        ...


def image_tensors(model: Any, images: Sequence[PromptImage]) -> dict[str, Tensor]:
    """What `model` needs of `images`, in order; empty for none."""
    return tensors_for(model, [image.features for image in images])
