"""A problem as the student reads it: its messages as token ids, including those of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onstream.pipeline.images import (
    ImageError,
    ImageFile,
    ImageLimits,
    Message,
    PromptImage,
    for_template,
    image_urls,
    read_image,
    reference_of,
    with_urls,
)
from onstream.pipeline.models.tokenizer import has_vision
from onstream.pipeline.records import Ids
from onstream.settings.root import Settings
from onstream.settings.sections.images import ImagesSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from onstream.pipeline.images.vision import Vision

PROMPTS_KEPT = 64
"""Problems whose prompts are kept, so that a group's is rendered once."""
IMAGES_KEPT = 64
"""Images whose tensors are kept, so that an image of several prompts is processed once."""


@dataclass(frozen=True)
class Prompt:
    """P token ids, the images among them, and the messages, which name images by digest."""

    ids: Ids  # [P]
    images: tuple[PromptImage, ...]
    messages: list[Message]

    @property
    def digests(self) -> list[str]:
        """The images by name, in the order of the prompt."""
        return [image.file.digest for image in self.images]

    @property
    def files(self) -> dict[str, bytes]:
        """The bytes of the images, by digest."""
        return {image.file.digest: image.file.data for image in self.images}


class PromptBuilder:
    """Reads the images of messages, and builds the student's prompts with their tokens.

    `vision` is None for a student that reads no images.
    """

    def __init__(self, vision: Vision | None, settings: ImagesSettings) -> None:
        self._vision = vision
        self._settings = settings
        self._limits = ImageLimits(
            settings.max_bytes, settings.max_pixels, settings.allowed_hosts, settings.fetch_timeout
        )
        self._processed = lru_cache(maxsize=IMAGES_KEPT)(self._process)

    def images_of(self, messages: Sequence[Message]) -> tuple[PromptImage, ...]:
        """The images of `messages`, in order.

        Raises:
            ImageError: one cannot be used, there are more than allowed, or the student reads none.
        """
        if _is_text(messages):
            return ()
        try:
            urls = image_urls(messages)
        except ValueError as error:
            raise ImageError(str(error)) from error
        if urls and self._vision is None:
            raise ImageError(
                "the prompt holds images and the student reads none; "
                "choose a vision-language model as `model.name`"
            )
        most = self._settings.max_per_prompt
        if len(urls) > most:
            raise ImageError(
                f"the prompt holds {len(urls)} images; images.max_per_prompt is {most}"
            )
        return tuple(self._processed(read_image(url, self._limits)) for url in urls)

    def build(
        self, ids: Ids, messages: Sequence[Message], images: tuple[PromptImage, ...]
    ) -> Prompt:
        """The prompt that the template rendered as `ids`, with the images' own tokens.

        In `ids` each image is one placeholder.

        Raises:
            ImageError: the template shows another number of images.
        """
        if self._vision is None:
            return Prompt(ids, (), list(messages))
        try:
            expanded = self._vision.expand(ids, [image.features for image in images])
        except ValueError as error:
            raise ImageError(str(error)) from error
        references = {
            url: reference_of(image.file.digest)
            for url, image in zip(image_urls(messages), images, strict=True)
        }
        return Prompt(expanded, images, with_urls(messages, references))

    def image_marks(self, file: ImageFile) -> list[int]:
        """The tokens by which a prompt shows `file`, as far as texts have none of them.

        Empty for a student that reads no images.
        """
        if self._vision is None:
            return []
        return self._vision.marks(self._processed(file).features.token_ids)

    def _process(self, file: ImageFile) -> PromptImage:
        assert self._vision is not None
        return PromptImage(file, self._vision.features(file))


def prompt_builder(name: str | Path, config: PretrainedConfig, settings: Settings) -> PromptBuilder:
    """The prompt builder of the student `name`.

    Raises:
        UserError: the student reads images, and its processor cannot be loaded.
    """
    if not has_vision(config):
        return PromptBuilder(None, settings.images)
    from onstream.pipeline.images.vision import load_vision  # imports torch

    return PromptBuilder(load_vision(name), settings.images)


def render_prompt(tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any]) -> Ids:
    """The conversation through the chat template, up to where the answer begins.

    `arguments` are variables that the template reads. Each image is one placeholder.
    """
    shown = list(messages) if _is_text(messages) else for_template(messages)
    ids = tokenizer.apply_chat_template(
        shown, add_generation_prompt=True, return_dict=False, **arguments
    )
    return np.array(ids, dtype=np.int32)


def _is_text(messages: Sequence[Message]) -> bool:
    """Whether no message has content parts, and so none has an image."""
    return not any(isinstance(message.get("content"), list) for message in messages)
