"""The variables that each model's chat template is rendered with."""

from __future__ import annotations

from typing import Any

from onstream.settings.root import Settings
from onstream.settings.sections.client import EndpointModel
from onstream.settings.sections.inference import TeacherModelName

TEACHER_ARGUMENTS = (
    "teacher_inference.model.chat_template_kwargs",
    "orchestrator.teacher_model.model.chat_template_kwargs",
)
"""Where those of the teacher that scores are set, wherever it runs."""


def arguments_of(model: TeacherModelName | EndpointModel, settings: Settings) -> dict[str, Any]:
    """Those of a teacher: its own, or the student's where it has none."""
    own = model.chat_template_kwargs
    return settings.model.chat_template_kwargs if own is None else own


def own_teacher_arguments(settings: Settings) -> dict[str, Any] | None:
    """Those that are set for the teacher that scores; None where none are."""
    external = settings.orchestrator.teacher_model
    if external is not None and external.model.chat_template_kwargs is not None:
        return external.model.chat_template_kwargs
    return settings.teacher_inference.model.chat_template_kwargs
