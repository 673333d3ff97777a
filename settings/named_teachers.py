"""The teachers of `[teachers]`: which there are, and the settings by which their workers go."""

from __future__ import annotations

from onstream.pipeline.errors import UserError
from onstream.settings.root import Settings
from onstream.settings.route import teachers_of
from onstream.settings.sections.inference import TeacherInferenceSettings
from onstream.settings.stages import DEFAULT_TEACHER

ROWS = ("jsonl", "hf:")
"""How the names of tasks begin whose rows may name a teacher."""


def with_teacher(settings: Settings, name: str) -> Settings:
    """`settings` with the teacher `name` in the place of the default one, for its own worker.

    Raises:
        UserError: there is no teacher of that name.
    """
    if name == DEFAULT_TEACHER:
        return settings
    if name not in settings.teachers:
        known = teachers_of(settings) or (DEFAULT_TEACHER,)
        raise UserError(
            f"no teacher has the name {name!r}",
            expected=f"one of {', '.join(known)}",
            next_step=f"Correct the name, or add a table [teachers.{name}] to the run's settings.",
        )
    teacher = settings.teachers[name]
    orchestrator = settings.orchestrator.model_copy(update={"teacher_model": teacher.external})
    deployment = settings.deployment.model_copy(update={"num_teacher_gpus": None})
    return settings.model_copy(
        update={
            "teacher_inference": teacher.local or TeacherInferenceSettings(),
            "orchestrator": orchestrator,
            "deployment": deployment,
            "teachers": {},
        }
    )


def teacher_weights(settings: Settings) -> dict[str, float]:
    """The parts that the teachers have in the problems whose row names none, by their names."""
    given = settings.teachers
    return {name: given[name].weight if name in given else 1.0 for name in teachers_of(settings)}
