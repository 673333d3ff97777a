"""One image as a model reads it, and several as one batch.

Which tokens and tensors these are is decided by the processor: `onstream.pipeline.images.vision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onstream.pipeline.records import Ids


@dataclass(frozen=True)
class ImageFeatures:
    """One image as a model reads it.

    `token_ids` [I] stand for it in the prompt. `tensors` go to the model's vision tower
    (`pixel_values`, `image_grid_thw`, …).
    """

    token_ids: Ids
    tensors: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def joined(images: Sequence[ImageFeatures]) -> dict[str, Tensor]:
    """The tensors of several images as one batch, in order; empty for no images.

    Raises:
        ValueError: the images differ in size, and this family's tensors then fit in no one batch.
    """
    if not images:
        return {}
    try:
        return {
            name: torch.cat([image.tensors[name] for image in images]) for name in images[0].tensors
        }
    except RuntimeError as error:
        raise ValueError(
            f"images of different sizes do not go into one batch of this model: {error}"
        ) from error
