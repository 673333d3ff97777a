"""Held-out problems with one another's images: whoever answers them as well as before has not
looked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import image_urls, with_urls
from onstream.pipeline.tasks.base import Problem, Task


def swapped_problems(task: Task) -> dict[int, Problem]:
    """The held-out problems of `task` by index, each with the images of the next one of another
    answer; its own answer stays the right one.

    Those that show no image are left out, and those that no other problem has as many images for.

    Raises:
        UserError: that leaves none.
    """
    problems = [task.held_out(index) for index in range(task.held_out_size)]
    images = [tuple(image_urls(problem.messages)) for problem in problems]
    found = {}
    for index, problem in enumerate(problems):
        if (other := _partner(index, problems, images)) is not None:
            found[index] = _with_images(problem, images[other])
    if not found:
        shown = sum(map(bool, images))
        raise UserError(
            f"eval.swap_images = true, and of {len(problems)} held-out problems {shown} show images, none with one to swap them with",
            expected="at least two problems with as many images, and with different answers",
            next_step="Set `eval.swap_images = false`, or hold out more problems by `eval.samples`.",
        )
    return found


def _partner(
    index: int, problems: Sequence[Problem], images: Sequence[tuple[str, ...]]
) -> int | None:
    """The next problem, going round, with as many images, other ones, and another answer."""
    mine = images[index]
    size = len(problems)
    places = ((index + step) % size for step in range(1, size)) if mine else ()
    return next(
        (
            at
            for at in places
            if len(images[at]) == len(mine)
            and images[at] != mine
            and _differ(problems[index], problems[at])
        ),
        None,
    )


def _differ(one: Problem, other: Problem) -> bool:
    """Whether the answers are different; of problems without one, whether what their scorers get
    is.
    """
    return bool(one.info.get("answer", one.info) != other.info.get("answer", other.info))


def _with_images(problem: Problem, urls: Sequence[str]) -> Problem:
    following = iter(urls)
    return replace(problem, messages=with_urls(problem.messages, lambda _: next(following)))
