"""Requests to a teacher on vLLM about rollouts with images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from onstream.pipeline.images import ImageFile, PromptImage
from onstream.pipeline.images.feature_cache import FeatureCache, FetchImages, MissingImage
from onstream.pipeline.images.vision import load_vision
from onstream.pipeline.images.vllm_prompts import KEPT, VllmPrompts
from onstream.settings.root import Settings
from onstream.workers.teacher.scorer import ScoreRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RequestImages:
    """The images of requests about samples of the student of `settings`, as vLLM takes them.

    `config` is the student's configuration, and `fetch` gives the bytes of images by digest.
    """

    def __init__(self, settings: Settings, config: PretrainedConfig, fetch: FetchImages) -> None:
        self._features = FeatureCache(
            load_vision(settings.model.name), fetch, settings.images.keep_bytes
        )
        self._fetch = fetch
        self._vllm_prompts = VllmPrompts(config)
        self._image_file = lru_cache(maxsize=KEPT)(self._read)

    def prefetch(self, digests: Sequence[str]) -> None:
        """Begin to process images that will be asked for soon."""
        self._features.prefetch(digests)

    def problem_with(self, request: ScoreRequest) -> str | None:
        """Why `request` cannot be scored with all its images; None where it can."""
        try:
            for digest in request.images:
                self._image_file(digest)
        except MissingImage as error:
            return str(error)
        return self._features.problem_with(
            request.prompt_ids, request.completion_ids, request.images
        )

    def with_fields(self, request: ScoreRequest) -> ScoreRequest:
        """`request` as an endpoint is asked.

        Raises:
            MissingImage: the bytes of one of its images are gone.
        """
        if not request.images:
            return request
        fields = self._vllm_prompts.fields(
            request.prompt_ids, self._prompt_images(request), request.completion_ids.tolist()
        )
        return replace(request, image_fields=fields)

    def prompt(self, request: ScoreRequest) -> dict[str, Any]:
        """`request` as vLLM in this process is asked.

        Raises:
            MissingImage: the bytes of one of its images are gone.
        """
        return self._vllm_prompts.prompt(
            request.prompt_ids, self._prompt_images(request), request.completion_ids.tolist()
        )

    def close(self) -> None:
        """End the thread that processes images."""
        self._features.close()

    def _prompt_images(self, request: ScoreRequest) -> list[PromptImage]:
        features = self._features.get(request.images)
        return [
            PromptImage(self._image_file(digest), features[digest]) for digest in request.images
        ]

    def _read(self, digest: str) -> ImageFile:
        data = self._fetch([digest])[0]
        if data is None:
            raise MissingImage(f"the image {digest[:12]} is gone")
        return ImageFile(data)
