"""Requests to an external teacher about rollouts with images."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from onstream.pipeline.images import ImageFile, PromptImage
from onstream.pipeline.images.feature_cache import FeatureCache, FetchImages, MissingImage
from onstream.pipeline.images.vision import load_vision
from onstream.pipeline.images.vllm_prompts import KEPT, VllmPrompts
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.records import Sample
from onstream.settings.root import Settings
from onstream.workers.teacher.scorer import ScoreRequest
from onstream.workers.teacher.stage import request_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RequestImages:
    """Adds images to the requests about samples of the student of `settings`.

    `config` is the student's configuration, and `fetch` gives the bytes of images by digest.
    """

    def __init__(self, settings: Settings, config: PretrainedConfig, fetch: FetchImages) -> None:
        self._features = FeatureCache(
            load_vision(settings.model.name), fetch, settings.images.keep_bytes
        )
        self._fetch = fetch
        self._vllm_prompts = VllmPrompts(config)
        self._image_file = lru_cache(maxsize=KEPT)(self._read)

    def problem_with(self, sample: Sample) -> str | None:
        """Why `sample` cannot be scored with all its images; None where it can."""
        try:
            for digest in sample.images:
                self._image_file(digest)
        except MissingImage as error:
            return str(error)
        return self._features.problem_with(
            ids_array(sample.prompt_ids), ids_array(sample.completion_ids), sample.images
        )

    def request_of(self, sample: Sample) -> ScoreRequest:
        """What an endpoint is asked about `sample`.

        Raises:
            MissingImage: the bytes of one of its images are gone.
        """
        request = request_of(sample)
        if not request.images:
            return request
        features = self._features.get(request.images)
        images = [
            PromptImage(self._image_file(digest), features[digest]) for digest in request.images
        ]
        fields = self._vllm_prompts.fields(
            request.prompt_ids, images, request.completion_ids.tolist()
        )
        return replace(request, image_fields=fields)

    def close(self) -> None:
        """End the thread that processes images."""
        self._features.close()

    def _read(self, digest: str) -> ImageFile:
        data = self._fetch([digest])[0]
        if data is None:
            raise MissingImage(f"the image {digest[:12]} is gone")
        return ImageFile(data)
