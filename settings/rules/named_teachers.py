"""Rules between the settings of the teachers in `[teachers]`."""

from __future__ import annotations

from collections.abc import Iterator

from onstream.settings.devices import device_of
from onstream.settings.named_teachers import ROWS, teacher_weights
from onstream.settings.plan import make_plan
from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.root import Settings
from onstream.settings.stages import DEFAULT_TEACHER


def one_source(settings: Settings) -> Iterator[SettingsProblem]:
    """Each teacher has one source of scores, and none has the name of the page's own."""
    for name, teacher in settings.teachers.items():
        section = f"teachers.{name}"
        if name == DEFAULT_TEACHER:
            yield SettingsProblem(
                (section,),
                f"[{section}]",
                "another name: this is the teacher of teacher_inference and "
                "orchestrator.teacher_model",
                "Rename the table.",
            )
        if (teacher.local is None) == (teacher.external is None):
            both = "both" if teacher.local else "neither"
            yield SettingsProblem(
                (section,),
                f"[{section}] has {both} of `local` and `external`",
                "one of them",
                f"Set {section}.local.model.name for a model that its workers hold, or "
                f"{section}.external.model.name for one at an endpoint.",
            )


def named_endpoints(settings: Settings) -> Iterator[SettingsProblem]:
    """A teacher at endpoints has a name there, and an address where a worker is started here."""
    plan = make_plan(settings)
    for name, teacher in settings.teachers.items():
        external = teacher.external
        section = f"teachers.{name}.external"
        if external is None:
            continue
        if not external.model.name:
            yield problem_with(
                settings,
                [f"{section}.model.name"],
                "the model's name at the endpoint",
                f"Set {section}.model.name as its /models lists it.",
            )
        if not external.client.base_url and plan.named_teachers[name].workers:
            yield problem_with(
                settings,
                [f"{section}.client.base_url"],
                "the address of an endpoint for its worker to ask",
                f'Set {section}.client.base_url = ["http://host:8000/v1"], or '
                f"teachers.{name}.workers = 0.",
            )


def workers_of_named(settings: Settings) -> Iterator[SettingsProblem]:
    """What is started here for a teacher by name is a worker with its model, on a CPU."""
    plan = make_plan(settings)
    for name, teacher in settings.teachers.items():
        if teacher.local is None:
            continue
        section = f"teachers.{name}"
        if teacher.local.engine == "vllm":
            yield problem_with(
                settings,
                [f"{section}.local.engine"],
                "transformers or vllm-in-process: no server is started for a teacher by name",
                f"Start a server, and give its address as {section}.external.client.base_url.",
            )
        if plan.named_teachers[name].workers and device_of(settings.deployment) == "cuda":
            yield problem_with(
                settings,
                [f"{section}.workers"],
                "0 where models run on CUDA: the GPU of a teacher by name is yours to choose",
                f"Set {section}.workers = 0, and start `CUDA_VISIBLE_DEVICES=… onstream worker "
                f"teacher --name {name}`.",
            )


def read_by_the_loss(settings: Settings) -> Iterator[SettingsProblem]:
    """Teachers by name score for a loss that reads scores."""
    loss = settings.trainer.loss
    if settings.teachers and not loss.reads_teacher:
        yield problem_with(
            settings,
            ["trainer.loss.type"],
            f"no teacher that scores tokens: {loss.type} reads none of it",
            f"Leave {' and '.join(f'[teachers.{name}]' for name in settings.teachers)} out.",
        )


def some_teacher(settings: Settings) -> Iterator[SettingsProblem]:
    """Where no row can name a teacher, one has a weight."""
    weights = teacher_weights(settings)
    if weights and not any(weights.values()) and not settings.task.name.startswith(ROWS):
        yield problem_with(
            settings,
            ["task.name", *(f"teachers.{name}.weight" for name in settings.teachers)],
            "a weight above 0: the problems of this task name no teacher",
            "Raise the weight of those that should score.",
        )


NAMED_TEACHER_RULES = (
    one_source,
    named_endpoints,
    workers_of_named,
    read_by_the_loss,
    some_teacher,
)
