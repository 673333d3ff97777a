"""The procedural tasks, their order, their held-out part, and how tasks are found by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import Problem, Task, load_scorer, load_task
from onstream.settings.root import Settings

BUILTIN = ["reverse-text", "alphabet-sort", "arithmetic"]
GYM = ["reasoning-gym:leg_counting", "reasoning-gym:word_sorting"]


def settings_of(name: str, *, seed: int = 0, samples: int = 64, **task: Any) -> Settings:
    return Settings.model_validate(
        {"task": {"name": name, **task}, "run": {"seed": seed}, "eval": {"samples": samples}}
    )


def task_of(name: str, *, seed: int = 0, samples: int = 64, **task: Any) -> Task:
    return load_task(settings_of(name, seed=seed, samples=samples, **task))


def asked(problem: Problem) -> str:
    return str(problem.messages[-1]["content"])


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("reverse-text", r"Reverse: [a-z]{4,10}"),
        ("alphabet-sort", r"Sort: [a-z]{4,10}"),
        ("arithmetic", r"Compute: .*"),
    ],
)
def test_prompts_are_one_short_user_message(name: str, question: str) -> None:
    for index in range(100):
        (message,) = task_of(name).train(index).messages
        assert message["role"] == "user" and re.fullmatch(question, message["content"])


def test_answers_are_right() -> None:
    for index in range(50):
        reverse, sort, compute = (task_of(name).train(index) for name in BUILTIN)
        assert reverse.info == {"answer": asked(reverse).removeprefix("Reverse: ")[::-1]}
        assert sort.info == {"answer": "".join(sorted(asked(sort).removeprefix("Sort: ")))}
        left, operation, right = re.fullmatch(r"Compute: (\d+)([+-])(\d+)", asked(compute)).groups()  # type: ignore[union-attr]
        assert compute.info == {"answer": str(int(left) + int(operation + right))}


@pytest.mark.parametrize("name", [*BUILTIN, *GYM])
def test_the_seed_decides_the_order_and_the_held_out_part_is_the_same_for_all(name: str) -> None:
    first = task_of(name)
    again = task_of(name)
    other = task_of(name, seed=1)
    assert [first.train(index) for index in (5, 3, 4)] == [
        again.train(index) for index in (5, 3, 4)
    ]
    assert [first.train(index) for index in range(20)] != [
        other.train(index) for index in range(20)
    ]
    assert [first.held_out(index) for index in range(64)] == [
        other.held_out(index) for index in range(64)
    ]


@pytest.mark.parametrize("name", [*BUILTIN, *GYM])
def test_no_prompt_is_both_trained_on_and_held_out_whatever_the_seed(name: str) -> None:
    held_out = {asked(task_of(name).held_out(index)) for index in range(64)}
    assert len(held_out) == 64
    for seed in (0, 1):
        task = task_of(name, seed=seed)
        assert not held_out & {asked(task.train(index)) for index in range(500)}


def test_a_task_of_few_contents_holds_out_fewer_than_asked_for_and_overlaps_nowhere() -> None:
    task = task_of("reverse-text", samples=256, args={"min_length": 1, "max_length": 1})
    held_out = {asked(task.held_out(index)) for index in range(task.held_out_size)}
    trained = {asked(task.train(index)) for index in range(2000)}
    assert 0 < len(held_out) == task.held_out_size < 26
    assert len(held_out) + len(trained) == 26 and not held_out & trained


def test_a_task_of_one_content_is_refused() -> None:
    with pytest.raises(UserError, match=r"gave no problem to (train on|hold out) in 4096 draws"):
        task = task_of("reasoning-gym:leg_counting", args={"size": 1})
        assert task.held_out_size


def test_with_no_samples_nothing_is_held_out() -> None:
    assert task_of("reverse-text", samples=0).held_out_size == 0


def test_the_system_prompt_comes_first() -> None:
    task = task_of("reverse-text", system_prompt="Answer in one word.")
    assert task.train(0).messages[0] == {"role": "system", "content": "Answer in one word."}
    assert task.held_out(0).messages[0]["role"] == "system"
    assert asked(task.train(0)) == asked(task_of("reverse-text").train(0))


def test_arguments_bound_what_is_asked() -> None:
    words = task_of("reverse-text", args={"min_length": 3, "max_length": 3})
    assert {len(words.train(index).info["answer"]) for index in range(50)} == {3}
    sums = task_of("arithmetic", args={"max_value": 5, "operations": ["+"]}, samples=1)
    assert {int(sums.train(index).info["answer"]) for index in range(300)} <= set(range(11))
    assert all("+" in asked(sums.train(index)) for index in range(50))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"min_lenght": 3},
            r"unknown field `min_lenght`; "
            r"expected among min_length \(default 4\), max_length \(default 10\)",
        ),
        ({"min_length": "3"}, r"Expected `int`, got `str` - at `\$.min_length`"),
        ({"min_length": 0}, r"Expected `int` >= 1 - at `\$.min_length`"),
        ({"min_length": 11}, "min_length 11 is more than max_length 10"),
    ],
)
def test_wrong_arguments_are_named_with_what_was_expected(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        task_of("reverse-text", args=args)


@pytest.mark.parametrize("load", [load_task, load_scorer])
def test_an_unknown_task_is_answered_with_the_nearest_known_one(load: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"'reverse-txt' is not a task; expected one of reverse-text, .* "
        r"Did you mean 'reverse-text'\?",
    ):
        load(settings_of("reverse-txt"))


def test_reasoning_gym_scores_with_its_own_scorer_and_takes_tagged_answers() -> None:
    settings = settings_of("reasoning-gym:leg_counting")
    problem = load_task(settings).train(7)
    score = load_scorer(settings)
    answer = problem.info["answer"]
    assert (
        score(answer, problem.info)
        == score(f"<think>so many legs</think> It is <answer> {answer} </answer>.", problem.info)
        == 1.0
    )
    assert score("none", problem.info) != 1.0


@pytest.mark.parametrize("name", ["word_ladder", "list_functions"])
def test_reasoning_gym_data_sets_that_list_their_problems_beforehand_work_too(name: str) -> None:
    settings = settings_of(f"reasoning-gym:{name}", samples=4)
    problem = load_task(settings).train(123)
    assert load_scorer(settings)(problem.info["answer"], problem.info) == 1.0


def test_an_unknown_reasoning_gym_data_set_is_answered_with_near_ones() -> None:
    with pytest.raises(
        UserError, match=r"no data set 'leg_count'; expected one of its names \(leg_counting"
    ):
        task_of("reasoning-gym:leg_count")


def test_a_wrong_reasoning_gym_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="unexpected keyword argument 'legs'"):
        task_of("reasoning-gym:leg_counting", args={"legs": 3})
    with pytest.raises(UserError, match="of reasoning-gym:leg_counting"):
        task_of("reasoning-gym:leg_counting", args={"min_animals": -1})
