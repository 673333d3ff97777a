"""`[teachers.<name>]`: teachers by name, beside the one of the other sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from onstream.settings.base import RUN, WORKER, Section, Unit
from onstream.settings.sections.client import TeacherModelSettings
from onstream.settings.sections.inference import TeacherInferenceSettings
from onstream.settings.stages import TEACHER_NAME

TeacherName = Annotated[str, Field(pattern=f"^{TEACHER_NAME}$")]


class NamedTeacherSettings(Section):
    """A teacher with a name, a stream and workers of its own (docs/teachers.md#several-teachers).
    Its model is that of `[teachers.<name>.local]`, with the settings of `[teacher_inference]`, or
    is asked for at the endpoints of `[teachers.<name>.external]`, with those of
    `[orchestrator.teacher_model]`.
    """

    weight: Annotated[float, RUN, Unit("parts"), Field(ge=0, le=1e6)] = 1.0
    """Its part of the problems whose row names no teacher; the teacher `default`, where there is
    one, has the weight 1.
    """
    workers: Annotated[int, WORKER, Unit("processes"), Field(ge=0, le=1024)] = 1
    """How many workers `onstream up` starts for it; 0: others do, by
    `onstream worker teacher --name NAME`.
    """
    local: TeacherInferenceSettings | None = None
    external: TeacherModelSettings | None = None
