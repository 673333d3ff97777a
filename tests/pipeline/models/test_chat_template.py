from __future__ import annotations

from onstream.pipeline.models.chat_template import unread_arguments

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
