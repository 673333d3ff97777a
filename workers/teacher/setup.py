"""Loads the local teacher that the settings name, and compares it with the student before anything is scored."""

from __future__ import annotations

from pipeline.models.loading import load_model, resolve_device, resolve_dtype
from pipeline.models.probe import prepare
from pipeline.telemetry import get_logger
from settings.root import Settings
from workers.teacher.compatibility import check
from workers.teacher.local import LocalScorer
from workers.teacher.party import party


def load_local(settings: Settings) -> LocalScorer:
    """The teacher of `teacher_inference.model.name`, or the student's starting model where none is named.

    Raises:
        UserError: there is no such model, or it cannot judge this student's tokens.
    """
    local = settings.teacher_inference
    name = local.model.name or settings.model.name
    student, teacher = party(settings.model.name), party(name)
    check(student, teacher, settings.inference.sampling.max_completion)
    device = resolve_device(settings.deployment.device)
    model = load_model(name, dtype=resolve_dtype(local.dtype, device), device=device)
    if reason := prepare(model):
        get_logger().warning("shared prompts are scored once a rollout", teacher=name, reason=reason)
    return LocalScorer(
        name,
        model,
        context_tokens=teacher.context_tokens,
        vocabulary_size=min(student.vocabulary_size, teacher.vocabulary_size),
        max_batch_tokens=local.max_batch_tokens,
        head_chunk=local.head_chunk,
    )
