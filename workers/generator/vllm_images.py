"""Prompts with images for vLLM: the pictures go to its own processor, and what that makes of the prompt must be what the student's made."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Exit, UserError
from pipeline.images import Picture, plain_picture
from settings.root import Settings
from workers.generator.engine import Request
from workers.generator.vllm_start import did_not_start

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.inputs.engine import EngineInput

    from workers.generator.student import Student
    from workers.generator.vllm_request import Writing

KEPT = 64
"""Images that are kept decoded, so that what prompts share is decoded once."""
TRIED = (64, 48)
"""Width and height, in pixels, of the picture that is shown at the start."""


class Pictures:
    """Makes vLLM's inputs of requests that show images.

    vLLM processes an image once while its cache holds it, under the digest of the file. What it sends to its processes then is the digest
    alone, so inputs must reach them in the order in which they are made, and none be made while an update clears the caches.

    Args:
        renderer: vLLM's, in the thread of its requests.
        config: the model's; it names the token that stands for an image in what the chat template renders.
    """

    def __init__(self, renderer: Any, config: PretrainedConfig) -> None:
        self._renderer = renderer
        self._placeholder_id: int = getattr(config, "image_token_id", -1)
        self._decoded = lru_cache(maxsize=KEPT)(Picture.decoded)

    def input_of(self, writing: Writing) -> EngineInput:
        """The prompt of `writing` and what is written of it, with its images.

        Raises:
            UserError: vLLM reads other tokens than the student's processor made.
        """
        images = [image.picture for image in writing.request.images]
        prompt = {
            "prompt_token_ids": [*self._with_placeholders(writing.request), *writing.token_ids],
            "multi_modal_data": {"image": [self._decoded(image) for image in images]},
            "multi_modal_uuids": {"image": [image.digest for image in images]},
        }
        [made] = self._renderer.render_cmpl([prompt])
        if list(made["prompt_token_ids"]) != writing.prompt_ids:
            raise _read_otherwise(len(made["prompt_token_ids"]), len(writing.prompt_ids), len(images))
        result: EngineInput = made
        return result

    def _with_placeholders(self, request: Request) -> list[int]:
        """The prompt as the template rendered it, which vLLM expands itself: one placeholder in the place of each image's tokens."""
        ids, written, start = request.prompt_ids, list[int](), 0
        for image in request.images:
            tokens = image.features.token_ids
            windows = np.lib.stride_tricks.sliding_window_view(ids, len(tokens))[start:]
            place = start + int((windows == tokens).all(axis=1).argmax())
            written += [*ids[start:place].tolist(), self._placeholder_id]
            start = place + len(tokens)
        return [*written, *ids[start:].tolist()]


def require_same_reading(student: Student, settings: Settings) -> None:
    """Show it a picture, and have it write a token. Where it does not, the engine is closed.

    Raises:
        UserError: vLLM makes other tokens of the picture than the student's processor, or cannot compute the model's vision tower.
    """
    shown = {"type": "image_url", "image_url": {"url": plain_picture(*TRIED).data_url}}
    try:
        prompt = student.prompt([{"role": "user", "content": [shown]}])
        student.engine.add([Request(0, prompt.ids, max_tokens=1, seed=0, images=prompt.images)])
        while student.engine.active:
            student.engine.step()
    except Exception as error:
        student.engine.close()
        raise (error if isinstance(error, UserError) else did_not_start(error, settings)) from error


def _read_otherwise(theirs: int, ours: int, images: int) -> UserError:
    return UserError(
        f"of a prompt with {images} images vLLM makes {theirs} tokens that are not the {ours} that the student's processor makes",
        expected="the same tokens: the trainer would see another prompt than the one that was answered",
        next_step='Set inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )
