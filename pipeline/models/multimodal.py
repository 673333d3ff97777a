"""Images as a model reads them: their tensors, and the positions of their tokens in a row.

Only rows that show images come here. Which tokens and tensors an image has is decided by the
processor: `onstream.pipeline.images.vision`.

Families with multimodal rotary positions (Qwen-VL) place the tokens of an image by time, height and
width, and go on after it where its largest side ends. The others count tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.models.packing import PrefixGroup, SharedPrefixRow
from onstream.pipeline.models.trial import decoder_of
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


TOKEN_KINDS = ("mm_token_type_ids", "token_type_ids")

Features = Mapping[str, ImageFeatures]
"""Images as a model reads them, by the names that prompts have for them."""


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


def image_tensors(
    model: PreTrainedModel, groups: Sequence[PrefixGroup], features: Features
) -> dict[str, Tensor]:
    """The tensors that `model` needs of the images that `groups` show, in the order shown.

    Empty where they show none.
    """
    return tensors_for(model, [features[name] for group in groups for name in group.images])


def tensors_for(model: PreTrainedModel, images: Sequence[ImageFeatures]) -> dict[str, Tensor]:
    """The tensors of `images`, on the model's device and in its precision."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in joined(images).items()
    }


def packed_positions(model: PreTrainedModel, packed: SharedPrefixRow, features: Features) -> Tensor:
    """Positions of a packed row: [1, T], or [3, 1, T] in a family that places images."""
    if not has_spatial_positions(model):
        return torch.from_numpy(packed.position_ids).to(model.device)[None]
    parts = []
    for group in packed.groups:
        images = [features[name] for name in group.images]
        prompt = prompt_positions(model, group.prompt_ids, images)
        parts.append(prompt)
        # An image takes fewer positions than tokens, so completions do not start at P.
        start = int(prompt.max()) + 1
        for completion in group.completions:
            parts.append((start + torch.arange(len(completion) - 1)).expand(3, -1))
    return torch.cat(parts, dim=1).to(model.device)[:, None]


def prompt_positions(
    model: PreTrainedModel, prompt_ids: npt.NDArray[np.integer], images: Sequence[ImageFeatures]
) -> Tensor:
    """Positions [3, P] of a prompt's tokens: time, height and width, by the model's own rule."""
    ids = torch.from_numpy(prompt_ids)[None].long()
    if not images:
        return torch.arange(ids.shape[1]).expand(3, -1)
    grids = {name: tensor for name, tensor in joined(images).items() if name.endswith("_grid_thw")}
    positions: Tensor = decoder_of(model).get_rope_index(
        ids, mm_token_type_ids=token_kinds(model, ids), **grids
    )[0]
    return positions[:, 0]


def padded_inputs(
    model: PreTrainedModel, input_ids: Tensor, groups: Sequence[PrefixGroup], features: Features
) -> dict[str, Tensor]:
    """What `model` needs beside `input_ids` [rows, S] to find positions and mask itself.

    Each row is one of `groups`.
    """
    tensors = image_tensors(model, groups, features)
    if tensors and (name := token_kinds_argument(model)):
        tensors[name] = token_kinds(model, input_ids)
    return tensors


def token_kinds_argument(model: PreTrainedModel) -> str | None:
    """The argument by which `model` is told which tokens are of images; None where it takes none.

    Families with spatial positions need it for those, Gemma's for the mask: the tokens of an image
    see one another there, later ones too.
    """
    taken = inspect.signature(decoder_of(model).forward).parameters
    return next((name for name in TOKEN_KINDS if name in taken), None)


def images_see_themselves(model: PreTrainedModel) -> bool:
    """Whether the tokens of an image see the later ones of the same image."""
    return token_kinds_argument(model) is not None and not has_spatial_positions(model)


def token_kinds(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """1 for the tokens of an image, 0 for others; in the shape of `input_ids`."""
    image: int = model.config.image_token_id
    return (input_ids == image).int()


def has_spatial_positions(model: PreTrainedModel) -> bool:
    """Whether the model gives the tokens of images positions in time, height and width."""
    return hasattr(decoder_of(model), "get_rope_index")
