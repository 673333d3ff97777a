"""Held-out problems with one another's images.

A student that answers them as well as before does not use the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import image_urls, with_urls
from onstream.pipeline.tasks.base import Problem, Task


def swapped_problems(task: Task) -> dict[int, Problem]:
    """The held-out problems of `task` by index, with one another's images.

    Each has those of the next problem that has another answer. Its own answer stays the right one.

    Left out are problems without images, and those for which no other one has as many images.

    Raises:
        UserError: no problem is left.
    """
    problems = [task.held_out(index) for index in range(task.held_out_size)]
    images = [tuple(image_urls(problem.messages)) for problem in problems]
    swapped = {}
    for index, problem in enumerate(problems):
        other = _partner(index, problems, images)
        if other is not None:
            swapped[index] = _with_images(problem, images[other])
    if not swapped:
        shown = sum(map(bool, images))
        raise UserError(
            f"eval.swap_images = true, and of {len(problems)} held-out problems {shown} show "
            "images, none with one to swap them with",
            expected="at least two problems with as many images, and with different answers",
            next_step="Set `eval.swap_images = false`, or hold out more problems by "
            "`eval.samples`.",
        )
    return swapped


def _partner(
    index: int, problems: Sequence[Problem], images: Sequence[tuple[str, ...]]
) -> int | None:
    """The next problem, going round, with as many images, other ones, and another answer."""
    mine = images[index]
    if not mine:
        return None
    size = len(problems)
    for step in range(1, size):
        at = (index + step) % size
        as_many_others = len(images[at]) == len(mine) and images[at] != mine
        if as_many_others and _answers_differ(problems[index], problems[at]):
            return at
    return None


def _answers_differ(one: Problem, other: Problem) -> bool:
    """Whether the answers are different, or the whole `info` of problems without one."""
    return bool(one.info.get("answer", one.info) != other.info.get("answer", other.info))


def _with_images(problem: Problem, urls: Sequence[str]) -> Problem:
    following = iter(urls)
    return replace(problem, messages=with_urls(problem.messages, lambda _: next(following)))
