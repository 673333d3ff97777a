"""How the student is told of tools, and what becomes of its calls."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from onstream.pipeline.environments.tools import ToolError, call_tools, tool_schema


def search(words: str, most: int = 3, order: Literal["new", "old"] = "new") -> list[str]:
    """Search the library.

    Args:
        words: what to search for
        most: how many books to name
    """
    return [words.upper()] * most


def fail() -> str:
    """Fail."""
    raise RuntimeError("no library today")


def called(content: str) -> list[str]:
    message = {"role": "assistant", "content": content}
    return [answer["content"] for answer in call_tools(message, [search, fail])]


def test_a_typed_function_is_described_by_its_signature_and_docstring() -> None:
    assert tool_schema(search) == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the library.",
            "parameters": {
                "type": "object",
                "properties": {
                    "words": {"type": "string", "description": "what to search for"},
                    "most": {
                        "type": "integer",
                        "default": 3,
                        "description": "how many books to name",
                    },
                    "order": {"enum": ["new", "old"], "default": "new"},
                },
                "required": ["words"],
                "additionalProperties": False,
            },
        },
    }


def test_what_transformers_says_of_a_function_is_in_it() -> None:
    def multiply(a: float, b: float) -> float:
        """
        Multiply two numbers.

        Args:
            a: the first
            b: the second
        """
        return a * b

    theirs = get_json_schema(multiply)["function"]
    ours = tool_schema(multiply)["function"]
    assert (ours["name"], ours["description"]) == (theirs["name"], theirs["description"])
    assert ours["parameters"]["properties"] == theirs["parameters"]["properties"]
    assert ours["parameters"]["required"] == theirs["parameters"]["required"]


def test_calls_are_done_in_their_order_and_each_gets_a_message() -> None:
    content = (
        "I look.\n<tool_call>\n"
        '{"name": "search", "arguments": {"words": "sun", "most": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "search", "arguments": {"words": "sea", "most": 2}}</tool_call>'
    )
    assert called(content) == ['["SUN"]', '["SEA","SEA"]']
    assert called("No call here.") == []


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('{"name": "search"}', "error: ValidationError: Object missing required field `words`"),
        (
            '{"name": "search", "arguments": {"words": 3}}',
            "error: ValidationError: Expected `str`, got `int` - at `$.words`",
        ),
        (
            '{"name": "search", "arguments": {"words": "a", "pages": 3}}',
            "error: ValidationError: Object contains unknown field `pages`",
        ),
        ('{"name": "find"}', "error: there is no tool 'find'; there are search, fail"),
        ('{"name": "fail"}', "error: RuntimeError: no library today"),
        ('{"name": "sea', "error: the call is not a JSON object"),
        ("[]", "error: the call is not a JSON object"),
    ],
)
def test_what_is_wrong_with_a_call_and_what_a_tool_raises_the_student_is_told(
    call: str, told: str
) -> None:
    [answer] = called(f"<tool_call>{call}</tool_call>")
    assert answer.startswith(told)


def no_type(words) -> str:  # type: ignore[no-untyped-def]
    """Search."""
    return str(words)


def no_docstring(words: str) -> str:
    return words


def any_number(*words: str) -> str:
    """Search."""
    return "".join(words)


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (no_type, "parameter 'words' of no_type has no type"),
        (no_docstring, "no_docstring has no docstring"),
        (any_number, r"takes \*words"),
    ],
)
def test_a_function_that_cannot_be_described_is_refused(tool: Any, reason: str) -> None:
    with pytest.raises(ToolError, match=reason):
        tool_schema(tool)
