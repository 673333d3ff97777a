"""Tasks: what the student is asked, and how an answer is scored."""

from __future__ import annotations

import difflib
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.pipeline.import_path import import_function, search_modules_in
from onstream.pipeline.tasks.answer_scorers import ANSWER_SCORERS, JUDGE, answer_scorer
from onstream.pipeline.tasks.base import Problem, Task
from onstream.pipeline.tasks.procedural import BUILTIN, ProceduralTask, builtin_draw
from onstream.pipeline.tasks.scorers import (
    RolloutError,
    Score,
    ScoreError,
    Scorer,
    match_answer,
    read_score,
)
from onstream.pipeline.tasks.teacher_prompt import TeacherPrompt
from onstream.settings.root import Settings

GYM = "reasoning-gym:"
HUGGING_FACE = "hf:"
CODE_SCORER = "code"

__all__ = [
    "JUDGE",
    "Problem",
    "RolloutError",
    "Score",
    "ScoreError",
    "Scorer",
    "Task",
    "is_on_hub",
    "load_scorer",
    "load_task",
    "read_score",
]


def load_task(settings: Settings) -> Task:
    """The task that `[task]` names.

    Raises:
        UserError: no such task, wrong arguments, bad or missing data, or nothing to train on.
    """
    task = settings.task
    name = task.name
    if name == "jsonl":
        from onstream.pipeline.tasks.jsonl import load_jsonl

        return load_jsonl(settings)
    if name.startswith(HUGGING_FACE):
        from onstream.pipeline.tasks.huggingface import load_huggingface

        return load_huggingface(settings)
    if name.startswith(GYM):
        from onstream.pipeline.tasks.reasoning_gym import gym_draw

        draw = gym_draw(settings)
    elif name in BUILTIN:
        draw = builtin_draw(name, task.args)
    else:
        raise _unknown(name)
    return ProceduralTask(
        draw,
        name=name,
        seed=settings.run.seed,
        samples=settings.eval.samples,
        system_prompt=task.system_prompt,
        teacher_prompt=TeacherPrompt(task.teacher_prompt),
    )


def is_on_hub(settings: Settings) -> bool:
    """Whether the task's problems are those of a data set that this machine has not."""
    name = settings.task.name
    return name.startswith(HUGGING_FACE) and not Path(name.removeprefix(HUGGING_FACE)).exists()


def load_scorer(settings: Settings) -> Scorer:
    """The function that scores a completion: `task.scorer`, or the task's own where that is unset.

    Raises:
        UserError: it cannot be imported, a package that it needs is not installed, the task does
            not exist, or this machine cannot confine the programs that it would run.
    """
    name = settings.task.name
    scorer = settings.task.scorer
    if scorer == CODE_SCORER:
        from onstream.pipeline.tasks.code import code_scorer

        return code_scorer(settings)
    if scorer in ANSWER_SCORERS:
        return answer_scorer(scorer)
    if scorer:
        search_modules_in(settings.run.modules)
        return import_function(scorer, setting="task.scorer")
    if name.startswith(GYM):
        from onstream.pipeline.tasks.reasoning_gym import gym_scorer

        return gym_scorer(settings)
    if name == "jsonl" or name.startswith(HUGGING_FACE) or name in BUILTIN:
        return match_answer
    raise _unknown(name)


def _unknown(name: str) -> UserError:
    known = [*BUILTIN, "jsonl", f"{GYM}<dataset>", f"{HUGGING_FACE}<path>"]
    hint = "Correct `task.name`."
    if near := difflib.get_close_matches(name, known, n=1):
        hint = f"Did you mean {near[0]!r}?"
    return UserError(
        f"`task.name` = {name!r} is not a task",
        expected=f"one of {', '.join(known)}",
        next_step=hint,
    )
