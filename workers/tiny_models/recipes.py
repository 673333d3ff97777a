"""The numbers of `onstream models make`: how a teacher and its student are shaped and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onstream.pipeline.errors import UserError
from onstream.workers.tiny_models.fresh import ModelShape

Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Recipe:
    """One model: its shape, and the supervised training on ground truth that makes it.

    The model is evaluated every `eval_interval` steps, and every `fine_eval_interval` once it is
    half way to `least`. Training stops as soon as its greedy exact-match share lies within `least`
    and `most`. A round that ends below `least` is followed by another one from its weights. A share
    above `most` makes the next round start afresh, at half the learning rate.

    `mistakes` is the mean share of completion tokens that the model reads replaced by wrong ones.
    They are not trained on. A teacher is asked what should follow the student's own mistakes; one
    that has only read right answers cannot know.

    A `blind` model is shown the picture of another problem. It learns what answers look like, but
    not to look at the picture.

    `task` are settings of the task besides its name. `max_completion` bounds what the model writes
    in an evaluation; None: twice the longest answer.
    """

    shape: ModelShape
    least: float
    most: float
    schedule: Literal["constant", "cosine"]
    round_steps: int
    eval_interval: int
    fine_eval_interval: int
    mistakes: float = 0.0
    blind: bool = False
    lr: float = 2e-3
    warmup_steps: int = 20
    batch_size: int = 64
    eval_samples: int = 512
    max_rounds: int = 4
    task: Mapping[str, Any] = field(default_factory=dict)
    max_completion: int | None = None


RECIPES: dict[Role, Recipe] = {
    "teacher": Recipe(
        ModelShape(hidden=128, layers=4, intermediate=384),
        least=0.985,
        most=1.0,
        schedule="cosine",
        round_steps=450,
        eval_interval=50,
        fine_eval_interval=50,
        mistakes=0.25,
    ),
    # Stopped early, with much of the task still to learn from its teacher.
    "student": Recipe(
        ModelShape(hidden=96, layers=3, intermediate=288),
        least=0.56,
        most=0.67,
        schedule="constant",
        round_steps=300,
        eval_interval=10,
        fine_eval_interval=2,
    ),
}

PICTURES: dict[Role, Recipe] = {
    "teacher": Recipe(
        ModelShape(hidden=64, layers=2, intermediate=192, heads=2, key_value_heads=1),
        least=0.985,
        most=1.0,
        schedule="cosine",
        round_steps=600,
        eval_interval=50,
        fine_eval_interval=50,
        mistakes=0.25,
        batch_size=32,
        eval_samples=256,
    ),
    # It answers in two colours, at the chance of guessing them.
    "student": Recipe(
        ModelShape(hidden=64, layers=2, intermediate=128, heads=2, key_value_heads=1),
        least=0.0,
        most=0.1,
        schedule="constant",
        round_steps=100,
        eval_interval=100,
        fine_eval_interval=100,
        blind=True,
        batch_size=32,
        eval_samples=256,
    ),
}
"""For tasks whose problems show pictures."""

_SUMS: dict[str, Any] = {
    "environment": "calculator",
    "args": {"terms": 3},
    "max_turns": 4,
    "max_episode": 160,
}
"""A call for each operation, and the answer."""

CALCULATOR: dict[Role, Recipe] = {
    "teacher": replace(
        RECIPES["teacher"],
        least=0.97,
        round_steps=600,
        mistakes=0.1,
        eval_samples=256,
        task=_SUMS,
        max_completion=32,
    ),
    # It calls the tool, and copies numbers with mistakes.
    "student": replace(
        RECIPES["student"],
        least=0.12,
        most=0.36,
        round_steps=600,
        fine_eval_interval=4,
        eval_samples=128,
        task=_SUMS,
        max_completion=32,
    ),
}
"""For sums in the environment `calculator`."""

_OF_TASK: dict[tuple[str, Role], dict[str, Any]] = {
    # Without mistakes, a student that stops at the same share then needs more than twice the steps
    # of distillation.
    ("alphabet-sort", "student"): {"mistakes": 0.25},
    # Sums of several digits are learnt late, and then at once: small batches never get there, nor
    # does a teacher half of whose carries are read wrong.
    ("arithmetic", "teacher"): {"mistakes": 0.0, "batch_size": 256, "round_steps": 1200},
    ("arithmetic", "student"): {"batch_size": 256, "round_steps": 1200},
}
"""What of a task's recipe differs from that of its role."""


def recipe_of(task: str, role: Role, environment: str | None = None) -> Recipe:
    """The recipe of a task's teacher or student.

    Raises:
        UserError: nobody knows how to play the `environment` on this task.
    """
    if environment is not None:
        if (task, environment) != ("arithmetic", "calculator"):
            raise UserError(
                f"the environment {environment!r} on the task {task!r}",
                expected="calculator on arithmetic, of which right episodes are known",
                next_step="Train a pair on episodes of your own with trainer.loss.type = 'sft'.",
            )
        return CALCULATOR[role]
    recipe = (PICTURES if task == "colour-words" else RECIPES)[role]
    return replace(recipe, **_OF_TASK.get((task, role), {}))
