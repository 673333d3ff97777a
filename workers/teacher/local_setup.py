"""Loads the local teacher that the settings name, and compares it with the student first."""

from __future__ import annotations

from transformers import AutoConfig

from onstream.pipeline.images.feature_cache import FeatureCache, FetchImages, no_images
from onstream.pipeline.images.vision import load_vision
from onstream.pipeline.models.loading import load_model, resolve_device, resolve_dtype
from onstream.pipeline.models.prompt_sharing import prepare
from onstream.pipeline.models.tokenizer import has_vision
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import check_compatible
from onstream.workers.teacher.image_compatibility import check_image_tokens
from onstream.workers.teacher.local_scorer import LocalScorer
from onstream.workers.teacher.model_info import load_model_info


def load_local(settings: Settings, images: FetchImages = no_images) -> LocalScorer:
    """The teacher `teacher_inference.model.name`.

    Where none is named, the student's starting model.

    `images` gives the bytes of images by digest; by default there are none.

    Raises:
        UserError: there is no such model, or it cannot score this student's tokens.
    """
    local = settings.teacher_inference
    name = local.model.name or settings.model.name
    student = load_model_info(settings.model.name)
    teacher = load_model_info(name)
    check_compatible(student, teacher, settings.inference.sampling.max_completion)
    device = resolve_device(settings.deployment.device)
    model = load_model(name, dtype=resolve_dtype(local.dtype, device), device=device)
    if reason := prepare(model):
        get_logger().warning(
            "shared prompts are scored once a rollout", teacher=name, reason=reason
        )
    vision = load_vision(name) if has_vision(model.config) else None
    if vision and has_vision(AutoConfig.from_pretrained(settings.model.name)):
        check_image_tokens(load_vision(settings.model.name), vision, settings.model.name, name)
    return LocalScorer(
        name,
        model,
        context_tokens=teacher.context_tokens,
        vocabulary_size=min(student.vocabulary_size, teacher.vocabulary_size),
        max_batch_tokens=local.max_batch_tokens,
        head_chunk=local.head_chunk,
        features=FeatureCache(vision, images, settings.images.keep_bytes) if vision else None,
    )
