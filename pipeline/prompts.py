"""A problem as the student reads it: its messages as token ids, with the tokens of its images among
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onstream.pipeline.images import (
    ImageError,
    Limits,
    Message,
    Picture,
    ShownImage,
    for_template,
    image_urls,
    read_picture,
    reference_of,
    with_urls,
)
from onstream.pipeline.models.tokenizer import has_vision
from onstream.pipeline.records import Ids
from onstream.settings.images import ImagesSettings
from onstream.settings.root import Settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from onstream.pipeline.images.vision import Vision

RENDERED = 64
"""Problems whose prompts are kept, so that a group's is rendered once."""
KEPT = 64
"""Images whose tensors are kept, so that what prompts share is processed once."""


@dataclass(frozen=True)
class Prompt:
    """What is asked: P token ids, the images among them in order, and the messages as they travel,
    images by reference.
    """

    ids: Ids  # [P]
    images: tuple[ShownImage, ...]
    messages: list[Message]

    @property
    def digests(self) -> list[str]:
        """The images by name, in the order in which they are shown."""
        return [image.picture.digest for image in self.images]

    @property
    def files(self) -> dict[str, bytes]:
        """The bytes of the images, by digest."""
        return {image.picture.digest: image.picture.data for image in self.images}


class Eyes:
    """Reads the images of messages, and makes of them what the student is given. `vision` is None
    for one that reads none.
    """

    def __init__(self, vision: Vision | None, settings: ImagesSettings) -> None:
        self._vision = vision
        self._settings = settings
        self._limits = Limits(
            settings.max_bytes, settings.max_pixels, settings.allowed_hosts, settings.fetch_timeout
        )
        self._shown = lru_cache(maxsize=KEPT)(self._look)

    def look(self, messages: Sequence[Message]) -> tuple[ShownImage, ...]:
        """The images of `messages`, in the order in which they are shown.

        Raises:
            ImageError: one cannot be used, there are more than allowed, or the student reads none.
        """
        try:
            urls = image_urls(messages)
        except ValueError as error:
            raise ImageError(str(error)) from error
        if urls and self._vision is None:
            raise ImageError(
                "the prompt holds images and the student reads none; choose a vision-language model as `model.name`"
            )
        if len(urls) > self._settings.max_per_prompt:
            raise ImageError(
                f"the prompt holds {len(urls)} images; images.max_per_prompt is {self._settings.max_per_prompt}"
            )
        return tuple(self._shown(read_picture(url, self._limits)) for url in urls)

    def prompt(
        self, ids: Ids, messages: Sequence[Message], images: tuple[ShownImage, ...]
    ) -> Prompt:
        """The prompt that the template rendered as `ids`, a placeholder for each image, with the
        images' own tokens.

        Raises:
            ImageError: the template shows another number of images.
        """
        if self._vision is None:
            return Prompt(ids, (), list(messages))
        try:
            expanded = self._vision.expand(ids, [image.features for image in images])
        except ValueError as error:
            raise ImageError(str(error)) from error
        names = {
            url: reference_of(image.picture.digest)
            for url, image in zip(image_urls(messages), images, strict=True)
        }
        return Prompt(expanded, images, with_urls(messages, names))

    def _look(self, picture: Picture) -> ShownImage:
        assert self._vision is not None
        return ShownImage(picture, self._vision.features(picture))


def eyes_of(name: str | Path, config: PretrainedConfig, settings: Settings) -> Eyes:
    """What reads the images of prompts for the student `name`.

    Raises:
        UserError: it reads images, and its processor cannot be loaded.
    """
    if not has_vision(config):
        return Eyes(None, settings.images)
    from onstream.pipeline.images.vision import load_vision  # imports torch

    return Eyes(load_vision(name), settings.images)


def rendered(tokenizer: Any, messages: Sequence[Message]) -> Ids:
    """The conversation through the chat template, up to where the answer begins; an image is one
    placeholder.
    """
    ids = tokenizer.apply_chat_template(
        for_template(messages), add_generation_prompt=True, return_dict=False
    )
    return np.array(ids, dtype=np.int32)
