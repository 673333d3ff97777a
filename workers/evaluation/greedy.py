"""Greedy evaluation of a model on the task's held-out problems.

It uses the generator's engine, and the verifier's scorer processes or the environment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import ImageError
from onstream.pipeline.tasks import Problem, Task, load_task
from onstream.pipeline.tasks.swapped_images import swapped_problems
from onstream.settings.root import Settings
from onstream.workers.evaluation.episodes import play_episodes
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.student import PromptTooLong, Student, load_student
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorers import scorers_of

EXACT = 1.0
"""The least reward of an answer that counts as exact."""
ROUNDING = 1e-9
"""What the sum of an episode's rewards may lack."""
WAIT_S = 1.0


def evaluate(model_dir: Path, settings: Settings) -> dict[str, Any]:
    """Answer each held-out problem with the model in `model_dir`, greedily, and score the answers.

    Returns:
        `exact`, the share of problems with a reward of 1 or more; `reward`, the mean of those that
        were scored (None if none was); `samples`, the number of problems; `unscored`, how many the
        scorer itself failed on; `seconds`. With `eval.swap_images` also `exact_swapped`: the share
        of `samples_swapped` problems that are answered right although the images of another problem
        are shown. With `task.environment` each problem is played to the end of its episode, and
        `turns` and `tool_calls` are how many of them an episode has, on average.

    Raises:
        UserError: the model, the task, its scorer or environment cannot be used, nothing is held
            out, or a problem does not fit the context.
    """
    started = time.monotonic()
    task = load_task(settings)
    problems = _held_out(task)
    student = load_student(model_dir, settings)
    if settings.task.environment is not None:
        result = _episodes(student, settings, problems)
    else:
        swapped = _with_images_swapped(task) if settings.eval.swap_images else {}
        result = _single_answers(student, settings, problems, swapped)
    result["seconds"] = time.monotonic() - started
    return result


def _single_answers(
    student: Student,
    settings: Settings,
    own: dict[str, Problem],
    swapped: dict[str, Problem],
) -> dict[str, Any]:
    problems = own | swapped
    answers = _answers(student, problems, settings.inference.sampling.max_completion)
    verdicts = _verdicts(settings, list(problems.values()), answers)
    rewards = [verdict.reward for verdict in verdicts]
    result = _summary(rewards[: len(own)])
    if swapped:
        result["exact_swapped"] = _exact(rewards[len(own) :])
        result["samples_swapped"] = len(swapped)
    return result


def _episodes(student: Student, settings: Settings, problems: dict[str, Problem]) -> dict[str, Any]:
    ended = play_episodes(student, settings, problems)
    return {
        **_summary([episode.reward for episode in ended]),
        "turns": sum(episode.turns for episode in ended) / len(ended),
        "tool_calls": sum(episode.tool_calls for episode in ended) / len(ended),
    }


def _held_out(task: Task) -> dict[str, Problem]:
    """The held-out problems of `task`, by their names in messages."""
    if task.held_out_size == 0:
        raise UserError(
            "there are no held-out problems",
            expected="at least one",
            next_step="Set `eval.samples` above 0.",
        )
    return {
        f"held-out problem {index}": task.held_out(index) for index in range(task.held_out_size)
    }


def _with_images_swapped(task: Task) -> dict[str, Problem]:
    """Held-out problems that show the images of another one, by their names in messages."""
    return {
        f"held-out problem {index} with another one's images": problem
        for index, problem in swapped_problems(task).items()
    }


def _summary(rewards: Sequence[float | None]) -> dict[str, Any]:
    scored = [reward for reward in rewards if reward is not None]
    return {
        "exact": _exact(rewards),
        "reward": sum(scored) / len(scored) if scored else None,
        "samples": len(rewards),
        "unscored": len(rewards) - len(scored),
    }


def _exact(rewards: Sequence[float | None]) -> float:
    """The share of `rewards` of 1 or more; an answer without one is not exact."""
    exact = [reward is not None and reward >= EXACT - ROUNDING for reward in rewards]
    return sum(exact) / len(exact)


def _answers(student: Student, problems: Mapping[str, Problem], max_completion: int) -> list[str]:
    """The greedy answer to each of `problems`, in their order."""
    requests = [
        _request(key, name, problem, student, max_completion)
        for key, (name, problem) in enumerate(problems.items())
    ]
    texts = [""] * len(requests)
    with contextlib.closing(student.engine) as engine:
        engine.add(requests)
        while engine.active:
            for completion in engine.step():
                texts[completion.key] = student.text(completion.token_ids)
    return texts


def _request(
    key: int, name: str, problem: Problem, student: Student, max_completion: int
) -> GenerationRequest:
    try:
        prompt = student.prompt(problem.messages)
        room = student.completion_room(prompt, max_completion)
    except (PromptTooLong, ImageError) as error:
        raise UserError(
            f"{name}: {error}",
            expected="prompts shorter than the context, and images within `[images]`",
            next_step="Change `[task]`.",
        ) from error
    return GenerationRequest(key, prompt.ids, room, seed=0, temperature=0.0, images=prompt.images)


def _verdicts(
    settings: Settings, problems: Sequence[Problem], answers: Sequence[str]
) -> list[Verdict]:
    """Score in processes that can be killed, or by the judge, as in the run.

    A scorer that hangs costs its problem, not the evaluation.
    """
    scorers = scorers_of(settings)
    scorers.start()
    try:
        for key, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
            scorers.score(key, problem.messages, answer, problem.info)
        verdicts: dict[int, Verdict] = {}
        while len(verdicts) < len(answers):
            verdicts.update(scorers.collect(WAIT_S))
    finally:
        scorers.close()
    return [verdicts[key] for key in range(len(answers))]
