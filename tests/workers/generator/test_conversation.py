"""What follows a turn of the student: the ids that real templates put there, and when none do."""

from __future__ import annotations

import json
from functools import cache

import pytest

from onstream.pipeline.environments.calculator import calculate
from onstream.pipeline.environments.tools import tool_schema
from onstream.pipeline.errors import UserError
from onstream.pipeline.images import Message
from onstream.workers.generator.conversation import Conversation
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.chat_templates import FAMILIES
from tests.workers.generator.templates import PLAIN, SCAFFOLD, TRIMMING

TOOLS = [tool_schema(calculate)]


def call(expression: str) -> str:
    arguments = {"name": "calculate", "arguments": {"expression": expression}}
    return f"<tool_call>\n{json.dumps(arguments)}\n</tool_call>"


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


QUESTION: Message = {"role": "user", "content": "What is 2 + 2?"}
WITH_TOOLS = [
    QUESTION,
    said(call("2 + 2")),
    {"role": "tool", "content": "4"},
    said(call("4 * 3")),
    {"role": "tool", "content": "12"},
    said("The answer is 12."),
    {"role": "user", "content": "And that again?"},
    said("The answer is 12."),
]
WITHOUT_TOOLS = [
    QUESTION,
    said("The answer is 4."),
    {"role": "user", "content": "And then?"},
    said("The answer is 12."),
    {"role": "user", "content": "And that again?"},
    said("The answer is 12."),
    {"role": "user", "content": "Why?"},
    said("That is it."),
]


@cache
def conversation(name: str) -> Conversation:
    family = FAMILIES[name]
    return Conversation(family.load(), family.arguments)


def samples(name: str, chat: list[Message], *, tools: bool) -> list[list[int]]:
    """The ids of each sample of `chat`, whose turns were sampled as the tokenizer writes them."""
    family = FAMILIES[name]
    tokenizer = family.load()
    end = tokenizer.convert_tokens_to_ids(family.ends[0])
    schemas = TOOLS if tools else []
    found: list[list[int]] = []
    for at, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        between = conversation(name).between(chat[:at], schemas, end) if found else None
        if between is None:
            found.append(conversation(name).prompt(chat[:at], schemas).tolist())
        else:
            found[-1] += between.tolist()
        text = message["content"]
        found[-1] += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    return found


def written_anew(name: str, chat: list[Message], *, tools: bool) -> list[int]:
    """The ids of the last turn's whole prompt as the template gives it, and of that turn."""
    family = FAMILIES[name]
    tokenizer = family.load()
    prompt = tokenizer.apply_chat_template(
        chat[:-1],
        tools=TOOLS if tools else None,
        add_generation_prompt=True,
        return_dict=False,
        **family.arguments,
    )
    end = tokenizer.convert_tokens_to_ids(family.ends[0])
    text = chat[-1]["content"]
    return [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"], end]


@pytest.mark.parametrize(
    "name",
    ["Qwen3", "Llama 3", "Llama 3.1", "Gemma 3", "Mistral v3", "Mistral v7", "Phi-4", "SmolLM2"],
)
def test_four_turns_of_a_template_that_keeps_history_are_one_sample_with_its_very_ids(
    name: str,
) -> None:
    made = samples(name, WITHOUT_TOOLS, tools=False)
    assert made == [written_anew(name, WITHOUT_TOOLS, tools=False)]


@pytest.mark.parametrize("name", ["Qwen3", "Nemotron 3, not thinking"])
def test_calls_and_their_results_are_one_sample_with_the_templates_very_ids(name: str) -> None:
    made = samples(name, WITH_TOOLS, tools=True)
    assert made == [written_anew(name, WITH_TOOLS, tools=True)]


def test_reasoning_that_the_template_drops_from_the_history_begins_a_new_sample() -> None:
    thought = "<think>\nFour.\n</think>\n\n"
    chat = [
        QUESTION,
        said(thought + call("2 + 2")),
        {"role": "tool", "content": "4"},
        said(thought + "The answer is 4."),
        {"role": "user", "content": "And then?"},
        said("That is it."),
    ]
    made = samples("Qwen3", chat, tools=True)
    assert made == [
        written_anew("Qwen3", chat[:4], tools=True),  # a tool's result keeps it
        written_anew("Qwen3", chat, tools=True),  # the user's question does not
    ]
    assert "Four." not in FAMILIES["Qwen3"].load().decode(made[1])


@pytest.mark.parametrize("name", ["Qwen3.5", "DeepSeek-R1-Distill", "gpt-oss"])
def test_a_template_that_rewrites_each_turn_gives_each_a_sample_with_the_prompt_it_gives(
    name: str,
) -> None:
    made = samples(name, WITHOUT_TOOLS, tools=False)
    assert made == [
        written_anew(name, WITHOUT_TOOLS[: at + 1], tools=False)
        for at in range(1, len(WITHOUT_TOOLS), 2)
    ]


def tiny(template: str | None = None) -> tuple[Conversation, int]:
    tokenizer = character_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return Conversation(tokenizer, {}), tokenizer.eos_token_id


def test_what_was_sampled_keeps_its_white_space_though_the_template_trims_it() -> None:
    made, end = tiny(TRIMMING)
    chat = [QUESTION, said("  cab \n"), {"role": "user", "content": "Add: z"}]
    between = made.between(chat, [], end)
    assert between is not None
    text = "<|im_start|>user\nAdd: z<|im_end|><|im_start|>assistant\n"
    assert between.tolist() == character_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_turn_that_ended_with_another_token_than_the_templates_begins_a_new_sample() -> None:
    made, end = tiny(PLAIN)
    chat = [QUESTION, said("cab"), {"role": "user", "content": "Add: z"}]
    assert made.between(chat, [], end) is not None
    other = character_tokenizer().convert_tokens_to_ids("<|endoftext|>")
    assert made.between(chat, [], other) is None


@pytest.mark.parametrize("template", [SCAFFOLD, PLAIN])
def test_tools_are_refused_where_the_template_tells_nothing_of_them(template: str) -> None:
    made, _ = tiny(template)
    made.require_turns()
    with pytest.raises(UserError, match="leaves out 'probe description' of a chat with tools"):
        made.require_tools()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Llama 3.1", "asks for tool calls in another form"),
        ("Qwen3.5", "asks for tool calls in another form"),
        ("Nemotron 3", "asks for tool calls in another form"),
        ("SmolLM2", "leaves out 'probe description'"),
        ("Mistral v3", "asks for tool calls in another form"),
        ("gpt-oss", "asks for tool calls in another form"),
        ("Gemma 3", "leaves out 'probe description'"),
    ],
)
def test_templates_that_ask_for_calls_in_another_form_are_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        conversation(name).require_tools()


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3, not thinking"])
def test_templates_that_ask_for_calls_as_they_are_read_are_taken(name: str) -> None:
    conversation(name).require_tools()


def test_several_turns_are_refused_where_the_template_takes_one() -> None:
    made, _ = tiny("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="leaves out 'first answer' of a chat with several turns"):
        made.require_turns()
