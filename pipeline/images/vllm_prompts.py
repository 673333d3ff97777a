"""Prompts with images for vLLM: the pictures go to its own processor, in the place of what the
student's processor made of them.

What vLLM makes of a prompt must then be what the student's processor made; whoever asks compares.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from onstream.pipeline.images import Picture, ShownImage
from onstream.pipeline.records import Ids

KEPT = 64
"""Images that are kept as they are sent, so that what prompts share is prepared once."""


class SentImages:
    """Makes what vLLM is sent of prompts that show images.

    vLLM processes an image once while its cache holds it, under the digest of the file. What is
    sent is the image decoded, as the student's processor gets it: decoders may differ in what they
    make of transparency and orientation.

    Args:
        config: the student's (a PretrainedConfig); it names the token that stands for an image in
            what the chat template renders.
    """

    def __init__(self, config: Any) -> None:
        self._placeholder_id: int = getattr(config, "image_token_id", -1)
        self._decoded = lru_cache(maxsize=KEPT)(Picture.decoded)
        self._url = lru_cache(maxsize=KEPT)(_url)

    def prompt(
        self, prompt_ids: Ids, images: Sequence[ShownImage], written: Sequence[int]
    ) -> dict[str, Any]:
        """A prompt [P] that shows `images` and what was written after it, as vLLM takes it in
        process.
        """
        pictures = [image.picture for image in images]
        return {
            "prompt_token_ids": self._with_placeholders(prompt_ids, images, written),
            "multi_modal_data": {"image": [self._decoded(picture) for picture in pictures]},
            "multi_modal_uuids": {"image": [picture.digest for picture in pictures]},
        }

    def fields(
        self, prompt_ids: Ids, images: Sequence[ShownImage], written: Sequence[int]
    ) -> dict[str, Any]:
        """The same as fields of a request to `/inference/v1/generate`, whose answer then has the
        `prompt_token_ids` to be compared.
        """
        pictures = [image.picture for image in images]
        parts = [
            {"type": "image_url", "url": self._url(picture), "uuid": picture.digest}
            for picture in pictures
        ]
        return {
            "token_ids": self._with_placeholders(prompt_ids, images, written),
            "content_parts": parts,
            "return_token_ids": True,
        }

    def _with_placeholders(
        self, ids: Ids, images: Sequence[ShownImage], written: Sequence[int]
    ) -> list[int]:
        """The prompt as the template rendered it, which vLLM expands itself: one placeholder in the
        place of each image's tokens.
        """
        made = list[int]()
        start = 0
        for image in images:
            tokens = image.features.token_ids
            windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))[start:]
            place = start + int((windows == tokens).all(axis=1).argmax())
            made += [*ids[start:place].tolist(), self._placeholder_id]
            start = place + len(tokens)
        return [*made, *ids[start:].tolist(), *written]


def _url(picture: Picture) -> str:
    target = io.BytesIO()
    picture.decoded().save(target, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
