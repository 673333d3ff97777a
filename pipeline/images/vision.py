"""What a model's processor makes of images: tokens in a prompt, tensors for the vision tower.

The family's own processor decides both. Each image is processed alone and once; a prompt's
placeholders are then replaced by the tokens of its images, and a batch's tensors are those of its
images, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor

from onstream.pipeline.errors import UserError
from onstream.pipeline.images.image_file import ImageError, ImageFile
from onstream.pipeline.models.multimodal import ImageFeatures
from onstream.pipeline.models.tokenizer import cached_first
from onstream.pipeline.records import Ids
from onstream.settings.extras import install_command

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor returns of a prompt's text; everything else is of its images."""


class PlaceholderMismatch(ValueError):
    """The chat template shows another number of images than the prompt has."""


class Vision:
    """The image side of one model. Not thread-safe.

    Args:
        processor: the family's own, with a tokenizer and an image processor.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.placeholder_id: int = processor.tokenizer.convert_tokens_to_ids(processor.image_token)

    def features(self, file: ImageFile) -> ImageFeatures:
        """What the processor makes of an image, in a prompt that is this image alone.

        Raises:
            ImageError: the processor does not take it.
        """
        image = file.decoded()
        shown = {"text": [self._processor.image_token], "images": [image]}
        try:
            made = self._processor(**shown, add_special_tokens=False, return_tensors="pt")
        except ValueError as error:
            name = type(self._processor).__name__
            size = f"{image.width} × {image.height}"
            raise ImageError(
                f"{name} does not take the image of {size} pixels: {error}. Scale or crop it."
            ) from error
        token_ids = made["input_ids"][0].numpy().astype(np.int32)
        tensors = {name: tensor for name, tensor in made.items() if name not in _TEXT}
        return ImageFeatures(token_ids, tensors)

    def expand(self, ids: Ids, images: Sequence[ImageFeatures]) -> Ids:
        """`ids` from the chat template, with each placeholder replaced by its image's tokens.

        Raises:
            PlaceholderMismatch: there are more or fewer placeholders than images.
        """
        places = np.flatnonzero(ids == self.placeholder_id)
        if len(places) != len(images):
            raise PlaceholderMismatch(
                f"the student's chat template shows {len(places)} images "
                f"of a prompt that holds {len(images)}: "
                "a template of another model, or an image's placeholder written in a text"
            )
        return np.concatenate(list(self._pieces(ids, places, images)), dtype=np.int32)

    def save(self, directory: Path) -> None:
        """Write the processor beside a model's files."""
        self._processor.save_pretrained(directory)

    def misplaced(self, ids: Ids, images: Sequence[ImageFeatures]) -> str | None:
        """Why a model cannot be given `ids` with `images`, in words; None where it can.

        It can where the tokens of all images are in `ids`, in order, and no others.
        """
        expected = np.empty(0, dtype=np.int32)
        if images:
            expected = np.concatenate([image.token_ids for image in images])
        marks = self.marks(expected)
        found = ids[np.isin(ids, marks)]
        expected = expected[np.isin(expected, marks)]
        if np.array_equal(found, expected):
            return None
        return (
            f"it holds {len(found)} tokens of images, where {len(expected)} stand for "
            f"the {len(images)} that its prompt shows"
        )

    def marks(self, ids: Ids) -> list[int]:
        """The tokens among `ids`, those of images, that texts have not; and the placeholder.

        Gemma's processor also writes empty lines around an image, which texts have too.
        """
        special = self.tokenizer.added_tokens_decoder
        marks = {token for token in ids.tolist() if token in special and special[token].special}
        # Where the placeholder is another token than the image's own, the tokenizer names both.
        marks |= {self.placeholder_id, getattr(self.tokenizer, "image_token_id", None)}
        return [token for token in marks if token is not None]

    @staticmethod
    def _pieces(
        ids: Ids, places: Sequence[int] | np.ndarray[Any, Any], images: Sequence[ImageFeatures]
    ) -> Iterator[Ids]:
        start = 0
        for place, image in zip(places, images, strict=True):
            yield ids[start:place]
            yield image.token_ids
            start = place + 1
        yield ids[start:]


def load_vision(name: str | Path) -> Vision:
    """The image side of the model `name`.

    Raises:
        UserError: it has no processor, one without an image placeholder, or one that needs a
            library that is not here.
    """
    try:
        processor = cached_first(name, "processor", AutoProcessor.from_pretrained)
    except ImportError as error:
        raise UserError(
            f"the processor of {name} cannot be loaded: {' '.join(str(error).split())[:300]}",
            expected="the libraries that this family's image processor is written for",
            next_step=f"{install_command('vision')}.",
        ) from error
    has_token = isinstance(getattr(processor, "image_token", None), str)
    if not has_token or not hasattr(processor, "image_processor"):
        raise UserError(
            f"the processor of {name} ({type(processor).__name__}) names no image placeholder",
            expected="a processor with an image_processor and an image_token, "
            "such as Qwen-VL's or LLaVA's",
            next_step="Use a model of another family, or leave images out of the prompts.",
        )
    return Vision(processor)
