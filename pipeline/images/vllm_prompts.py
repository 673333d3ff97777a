"""Prompts with images for vLLM: its own processor reads the image files.

What vLLM makes of a prompt must equal what the student's processor made; the caller compares.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from onstream.pipeline.images.image_file import ImageFile, PromptImage
from onstream.pipeline.records import Ids

KEPT = 64
"""Images that are kept as they are sent, so that prompts of one group share the work."""


class VllmPrompts:
    """Builds the form in which vLLM takes prompts with images.

    vLLM processes an image once while its cache has it, by the digest of the file. The image is
    sent decoded, as the student's processor gets it: decoders may differ in what they make of
    transparency and orientation.

    Args:
        config: the student's PretrainedConfig. It names the token that stands for an image in what
            the chat template renders.
    """

    def __init__(self, config: Any) -> None:
        self._placeholder_id: int = getattr(config, "image_token_id", -1)
        self._decoded = lru_cache(maxsize=KEPT)(ImageFile.decoded)
        self._png_url = lru_cache(maxsize=KEPT)(_png_url)

    def prompt(
        self, prompt_ids: Ids, images: Sequence[PromptImage], written: Sequence[int]
    ) -> dict[str, Any]:
        """A prompt [P] with `images`, and the tokens written after it, for vLLM in process."""
        files = [image.file for image in images]
        return {
            "prompt_token_ids": self._with_placeholders(prompt_ids, images, written),
            "multi_modal_data": {"image": [self._decoded(file) for file in files]},
            "multi_modal_uuids": {"image": [file.digest for file in files]},
        }

    def fields(
        self, prompt_ids: Ids, images: Sequence[PromptImage], written: Sequence[int]
    ) -> dict[str, Any]:
        """The same as fields of a request to a server's `/inference/v1/generate`.

        The answer then has the `prompt_token_ids` that are to be compared.
        """
        parts = [
            {"type": "image_url", "url": self._png_url(image.file), "uuid": image.file.digest}
            for image in images
        ]
        return {
            "token_ids": self._with_placeholders(prompt_ids, images, written),
            "content_parts": parts,
            "return_token_ids": True,
        }

    def _with_placeholders(
        self, ids: Ids, images: Sequence[PromptImage], written: Sequence[int]
    ) -> list[int]:
        """The prompt as the template rendered it: one placeholder for each image's tokens.

        vLLM expands the placeholders itself.
        """
        collapsed = list[int]()
        start = 0
        for image in images:
            tokens = image.features.token_ids
            windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))[start:]
            place = start + int((windows == tokens).all(axis=1).argmax())
            collapsed += [*ids[start:place].tolist(), self._placeholder_id]
            start = place + len(tokens)
        return [*collapsed, *ids[start:].tolist(), *written]


def _png_url(file: ImageFile) -> str:
    target = io.BytesIO()
    file.decoded().save(target, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
