"""What a run may cost on a GPU, told before it starts. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.cost import StepCost, step_cost
from onstream.pipeline.models.memory import BFLOAT16, DecoderSizes
from onstream.settings.plan import Plan, make_plan
from onstream.settings.record_sizes import longest_completion
from onstream.settings.root import Settings
from onstream.workers.launcher.model_files import local_model, model_config, parameters

LEAST_PARAMETERS = 50_000_000
"""The time of a smaller student is not that of its products."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, and the bytes of keys and values of one token, 0 where not known."""

    parameters: int
    cache_bytes: int


def cost_rows(settings: Settings) -> dict[str, str]:
    """What `onstream check` prints of the run's cost, by the names of its lines.

    Nothing for tiny students, and where a model is not on this machine.
    """
    plan = make_plan(settings)
    try:
        student = _size(settings.model.name)
        teacher = _size(plan.teacher) if plan.teacher else ModelSize(0, 0)
    except UserError:  # told by the checks
        return {}
    if student is None or teacher is None or student.parameters < LEAST_PARAMETERS:
        return {}
    cost = _step_cost(settings, plan, student, teacher)
    steps = settings.trainer.max_steps
    writer = "elsewhere, not counted" if plan.rollout_teacher else _billions(student)
    return {
        "generate": _seconds(cost.generate_s, writer),
        "score": _seconds(cost.score_s, _scored_by(plan, teacher)),
        "train": _seconds(cost.train_s, "an adapter" if settings.trainer.lora else "all weights"),
        "a step": _seconds(cost.seconds, f"{cost.tokens:,} tokens of completion at most"),
        "the run": f"{_duration(steps * cost.seconds)}  {steps:,} steps; without evaluations and "
        "the start",
    }


def _step_cost(settings: Settings, plan: Plan, student: ModelSize, teacher: ModelSize) -> StepCost:
    return step_cost(
        student=student.parameters,
        teacher=teacher.parameters,
        rollouts=settings.orchestrator.batch_size,
        completion_tokens=longest_completion(settings),
        slots=settings.inference.max_batch,
        cache_bytes=student.cache_bytes,
        adapter=settings.trainer.lora is not None,
        recompute=settings.trainer.recompute != "none",
        generates=plan.rollout_teacher is None,
    )


def _size(name: str) -> ModelSize | None:
    """The size of a model, by its files and its configuration; None where it is not here.

    Raises:
        UserError: there is no such model.
    """
    directory = local_model(name, ask_hub=False)
    if directory is None:
        return None
    shape = DecoderSizes.of(model_config(directory, "model.name"))
    counted = parameters(directory) or (shape.parameters if shape is not None else 0)
    if not counted:
        return None
    return ModelSize(counted, shape.layers * 2 * shape.key * BFLOAT16 if shape is not None else 0)


def _billions(model: ModelSize) -> str:
    return f"{model.parameters / 1e9:.1f} billion parameters"


def _scored_by(plan: Plan, teacher: ModelSize) -> str:
    if teacher.parameters:
        return _billions(teacher)
    return "elsewhere, not counted" if plan.external_teacher else "no teacher"


def _seconds(seconds: float, words: str) -> str:
    return f"{seconds:8.2f} s  {words}"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:8.1f} min"
    return f"{seconds / 3600:8.1f} h"
