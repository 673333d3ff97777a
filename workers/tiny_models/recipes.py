"""How a teacher and its student are shaped and trained on ground truth: the numbers of `onstream
models make`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from onstream.workers.tiny_models.fresh import Shape

Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Recipe:
    """One model: its shape, and the supervised training on ground truth that makes it.

    Training stops at the first probe whose greedy exact-match share lies within `least` and `most`.
    A round that ends without reaching `least` is followed by one that goes on from its weights; a
    probe above `most` starts the next round afresh, at half the learning rate.

    `mistakes` is the mean share of tokens that are replaced by wrong ones in what the model reads
    of a completion, and that are not trained on. A teacher is asked what should follow the
    student's own mistakes; one that has read right answers alone knows nothing of that.

    A `blind` model is shown the picture of another problem: it learns what answers look like, and
    nothing of what it sees.
    """

    shape: Shape
    least: float
    most: float
    schedule: Literal["constant", "cosine"]
    round_steps: int
    probe_steps: int
    fine_probe_steps: int
    mistakes: float = 0.0
    blind: bool = False
    lr: float = 2e-3
    warmup_steps: int = 20
    batch_size: int = 64
    probe_samples: int = 512
    max_rounds: int = 4


RECIPES: dict[Role, Recipe] = {
    "teacher": Recipe(
        Shape(hidden=128, layers=4, intermediate=384),
        least=0.985,
        most=1.0,
        schedule="cosine",
        round_steps=450,
        probe_steps=50,
        fine_probe_steps=50,
        mistakes=0.25,
    ),
    # Stopped early, with much of the task still to learn from its teacher.
    "student": Recipe(
        Shape(hidden=96, layers=3, intermediate=288),
        least=0.56,
        most=0.67,
        schedule="constant",
        round_steps=300,
        probe_steps=10,
        fine_probe_steps=2,
    ),
}

PICTURES: dict[Role, Recipe] = {
    "teacher": Recipe(
        Shape(hidden=64, layers=2, intermediate=192, heads=2, key_value_heads=1),
        least=0.985,
        most=1.0,
        schedule="cosine",
        round_steps=600,
        probe_steps=50,
        fine_probe_steps=50,
        mistakes=0.25,
        batch_size=32,
        probe_samples=256,
    ),
    # It answers in two colours, at the chance of guessing them.
    "student": Recipe(
        Shape(hidden=64, layers=2, intermediate=128, heads=2, key_value_heads=1),
        least=0.0,
        most=0.1,
        schedule="constant",
        round_steps=100,
        probe_steps=100,
        fine_probe_steps=100,
        blind=True,
        batch_size=32,
        probe_samples=256,
    ),
}
"""For tasks whose problems show pictures."""

_OF_TASK: dict[tuple[str, Role], float] = {
    # Stopped at the same share without them, this student needs more than twice the steps to get
    # off the ground.
    ("alphabet-sort", "student"): 0.25,
}
"""Shares of mistakes that differ from the recipe's."""


def recipe_of(task: str, role: Role) -> Recipe:
    """The recipe of a task's teacher or student."""
    recipe = (PICTURES if task == "colour-words" else RECIPES)[role]
    return replace(recipe, mistakes=_OF_TASK.get((task, role), recipe.mistakes))
