"""The episodes that tiny models of a tool's use are made from."""

from __future__ import annotations

import json

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import Problem, load_task
from onstream.settings.root import Settings
from onstream.workers.generator.conversation import Conversation
from onstream.workers.tiny_models.character_tokenizer import (
    TOOL_TOKENS,
    VOCABULARY_SIZE,
    character_tokenizer,
)
from onstream.workers.tiny_models.episodes import RightEpisodes, next_turn
from onstream.workers.tiny_models.recipes import CALCULATOR, recipe_of

SETTINGS = Settings.model_validate({"task": {"name": "arithmetic", **CALCULATOR["teacher"].task}})
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "%s"}}</tool_call>'


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def tool(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([user("Compute: 12-34+5")], CALL % "12-34"),
        ([user("Compute: 12-34+5"), tool("-22")], CALL % "-22+5"),
        ([user("Compute: 12-34+5"), tool("-22"), tool("-17")], "-17"),
        ([user("Compute: 1+2"), tool("error: no")], "error: no"),
    ],
)
def test_who_knows_how_calls_for_each_operation_and_answers_with_the_last_result(
    messages: list[dict[str, str]], said: str
) -> None:
    assert next_turn(messages) == said


def test_an_episode_is_what_the_template_writes_and_the_students_turns_are_trained_on() -> None:
    tokenizer = character_tokenizer(tools=True)
    problem = Problem([user("Compute: 12-34+5")], {"answer": "-17"})
    sample = RightEpisodes(SETTINGS, tokenizer).sample(problem, 7)
    turns = [CALL % "12-34", CALL % "-22+5", "-17"]
    results = ["-22", "-17"]
    between = [f"<|im_start|><|tool|>{one}<|im_end|><|im_start|><|assistant|>" for one in results]
    end = tokenizer.eos_token
    assert tokenizer.decode(sample.completion_ids) == (
        f"{turns[0]}{end}{between[0]}{turns[1]}{end}{between[1]}{turns[2]}{end}"
    )
    trained = tokenizer.decode(sample.completion_ids[sample.loss_mask == 1])
    assert trained == end.join([*turns, ""])
    assert (sample.group, len(sample.completion_ids)) == (7, 7 + 9 + 3 * 2 + 6 + 7 + 4 + 5 + 4)


def test_an_episode_that_is_not_right_is_an_error() -> None:
    episodes = RightEpisodes(SETTINGS, character_tokenizer(tools=True))
    with pytest.raises(UserError, match=r"an episode on 'Compute: 1\+2' ends with the reward 0"):
        episodes.sample(Problem([user("Compute: 1+2")], {"answer": "4"}), 0)


def test_the_tokenizer_of_tools_has_as_many_tokens_and_its_template_says_how_to_call() -> None:
    tokenizer = character_tokenizer(tools=True)
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY_SIZE))
    for token in TOOL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    ids = tokenizer(CALL % "1+2").input_ids
    assert len(ids) == 8 + 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == CALL % "1+2"
    Conversation(tokenizer, {}).require_turns()
    Conversation(tokenizer, {}).require_tools()


def test_only_sums_with_the_calculator_have_right_episodes() -> None:
    with pytest.raises(UserError, match="the environment 'sort-turns' on the task 'arithmetic'"):
        recipe_of("arithmetic", "teacher", "sort-turns")
    assert recipe_of("arithmetic", "student", "calculator") is CALCULATOR["student"]


def test_problems_have_as_many_terms_as_the_recipe_says() -> None:
    problem = load_task(SETTINGS).train(0)
    question = problem.messages[0]["content"]
    assert json.loads(problem.info["answer"]) == eval(question.removeprefix("Compute: "))
    assert sum(question.count(sign) for sign in "+-") == 2
