from __future__ import annotations

import pytest

from onstream.pipeline.models.chat_template import unread_arguments
from tests.chat_templates import FAMILIES

ARGUMENTS = {"enable_thinking": False, "reasoning_effort": "low"}


def test_what_a_template_reads_is_told_from_what_it_does_not() -> None:
    asks = "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"
    sets = "{% set reasoning_effort = 'high' %}{{ reasoning_effort }}"
    assert unread_arguments(asks + sets, ARGUMENTS) == ["reasoning_effort"]


def test_tags_of_transformers_are_understood() -> None:
    template = (
        "{% for message in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{% generation %}{{ enable_thinking }}{% endgeneration %}{% endfor %}"
    )
    assert unread_arguments(template, ARGUMENTS) == ["reasoning_effort"]


def test_one_of_several_templates_reading_it_is_enough() -> None:
    several = {"default": "{{ enable_thinking }}", "tool_use": "{{ reasoning_effort }}"}
    assert unread_arguments(several, ARGUMENTS) == []


def test_a_template_that_does_not_parse_is_left_to_whoever_renders_it() -> None:
    assert unread_arguments("{% if %}", ARGUMENTS) == []


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("Qwen3", ["reasoning_effort"]),
        ("Qwen3.5", ["reasoning_effort"]),
        ("gpt-oss", ["enable_thinking"]),
        ("Llama 3.1", ["enable_thinking", "reasoning_effort"]),
        ("Mistral v7", ["enable_thinking", "reasoning_effort"]),
    ],
)
def test_real_templates_read_the_variables_that_their_models_are_known_for(
    name: str, unread: list[str]
) -> None:
    template = FAMILIES[name].load().chat_template
    assert isinstance(template, str)
    assert unread_arguments(template, ARGUMENTS) == unread
