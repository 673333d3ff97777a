"""Held-out problems with one another's images: the texts and the right answers stay, the images are
those of another answer.
"""

from __future__ import annotations

from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import image_urls
from onstream.pipeline.tasks import Problem
from onstream.pipeline.tasks.base import FiniteTask
from onstream.pipeline.tasks.swapped_images import swapped_problems
from tests.pipeline.tasks.test_tasks import task_of


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def problem(content: Any, answer: str | None) -> Problem:
    return Problem(
        [{"role": "user", "content": content}], {} if answer is None else {"answer": answer}
    )


def swapped(*held_out: Problem) -> dict[int, Problem]:
    return swapped_problems(
        FiniteTask([problem("to train on", "x")], held_out, name="task", seed=0)
    )


def test_each_picture_is_another_problem_s_with_another_answer() -> None:
    task = task_of("colour-words", samples=64)
    answers = {
        image_urls(task.held_out(index).messages)[0]: task.held_out(index).info["answer"]
        for index in range(64)
    }
    found = swapped_problems(task)
    assert list(found) == list(range(64))
    for index, other in found.items():
        (shown,) = image_urls(other.messages)
        assert answers[shown] != task.held_out(index).info["answer"] == other.info["answer"]


def test_images_come_from_the_next_problem_with_as_many_and_another_answer_and_texts_stay() -> None:
    found = swapped(
        problem([image("a"), text("and"), image("b"), text("?")], "one"),
        problem("no image", "two"),
        problem([image("c"), image("d")], "one"),
        problem([image("e")], "two"),
        problem([image("a"), image("b")], "two"),
        problem([text("look:"), image("f"), image("g")], "three"),
    )
    assert list(found) == [0, 2, 4, 5], "nobody else shows a single image, or none"
    assert found[0] == problem([image("f"), text("and"), image("g"), text("?")], "one")
    assert found[2] == problem([image("a"), image("b")], "one")
    assert found[4] == problem([image("f"), image("g")], "two")
    assert found[5] == problem([text("look:"), image("a"), image("b")], "three")


def test_problems_without_an_answer_differ_by_what_their_scorer_gets() -> None:
    one = Problem([{"role": "user", "content": [image("a")]}], {"cells": 1})
    other = problem([image("b")], None)
    assert {index: image_urls(found.messages) for index, found in swapped(one, other).items()} == {
        0: ["b"],
        1: ["a"],
    }


@pytest.mark.parametrize(
    ("held_out", "shown"),
    [
        ([problem("a", "1"), problem("b", "2")], 0),
        ([problem([image("a")], "1"), problem([image("b")], "1")], 2),
    ],
    ids=["no images", "one answer"],
)
def test_where_nothing_can_be_swapped_that_is_an_error(held_out: list[Problem], shown: int) -> None:
    with pytest.raises(
        UserError, match=rf"eval.swap_images = true, and of 2 held-out problems {shown} show images"
    ):
        swapped(*held_out)
