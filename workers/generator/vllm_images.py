"""Prompts with images for vLLM: the pictures go to its own processor, and what that makes of the prompt must be what the student's made."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Exit, UserError
from pipeline.images import Picture

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.inputs.engine import EngineInput

    from workers.generator.vllm_request import Writing

KEPT = 64
"""Images that are kept as they are sent, so that what prompts share is prepared once."""


class Pictures:
    """Makes vLLM's inputs of requests that show images, in process and for a server.

    vLLM processes an image once while its cache holds it, under the digest of the file. What is sent is the image decoded, as the student's
    processor gets it: decoders may differ in what they make of transparency and orientation.

    Args:
        config: the model's; it names the token that stands for an image in what the chat template renders.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._placeholder_id: int = getattr(config, "image_token_id", -1)
        self._decoded = lru_cache(maxsize=KEPT)(Picture.decoded)
        self._url = lru_cache(maxsize=KEPT)(_url)

    def input_of(self, writing: Writing, renderer: Any) -> EngineInput:
        """The prompt of `writing` and what is written of it, with its images, as vLLM's own `renderer` makes it.

        Of an image in its cache vLLM sends its processes the digest alone. So inputs must reach them in the order in which they are made,
        and none be made while an update clears the caches.

        Raises:
            UserError: vLLM reads other tokens than the student's processor made.
        """
        images = [image.picture for image in writing.request.images]
        prompt = {
            "prompt_token_ids": self._with_placeholders(writing),
            "multi_modal_data": {"image": [self._decoded(image) for image in images]},
            "multi_modal_uuids": {"image": [image.digest for image in images]},
        }
        [made] = renderer.render_cmpl([prompt])
        require_same_tokens(made["prompt_token_ids"], writing)
        result: EngineInput = made
        return result

    def body_of(self, writing: Writing) -> dict[str, Any]:
        """The same as fields of a request to `/inference/v1/generate`, whose answer then has the `prompt_token_ids` to be compared."""
        images = [image.picture for image in writing.request.images]
        parts = [{"type": "image_url", "url": self._url(image), "uuid": image.digest} for image in images]
        return {"token_ids": self._with_placeholders(writing), "content_parts": parts, "return_token_ids": True}

    def _with_placeholders(self, writing: Writing) -> list[int]:
        """The prompt as the template rendered it, which vLLM expands itself: one placeholder in the place of each image's tokens."""
        ids, made, start = writing.request.prompt_ids, list[int](), 0
        for image in writing.request.images:
            tokens = image.features.token_ids
            windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))[start:]
            place = start + int((windows == tokens).all(axis=1).argmax())
            made += [*ids[start:place].tolist(), self._placeholder_id]
            start = place + len(tokens)
        return [*made, *ids[start:].tolist(), *writing.token_ids]


def require_same_tokens(made: Sequence[int], writing: Writing) -> None:
    """Do nothing where vLLM made of a prompt with images what the student's processor made of it.

    Raises:
        UserError: it made something else.
    """
    ours = writing.prompt_ids
    if list(made) == ours:
        return
    raise UserError(
        f"of a prompt with {len(writing.request.images)} images vLLM makes {len(made)} tokens that are not the {len(ours)} that the "
        "student's processor makes",
        expected="the same tokens: the trainer would see another prompt than the one that was answered",
        next_step='Set inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )


def _url(picture: Picture) -> str:
    target = io.BytesIO()
    picture.decoded().save(target, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
