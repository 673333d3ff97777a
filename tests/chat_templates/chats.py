"""Chats that every template is tried on: what stands before the answer, and what was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
QUESTION = "What is 2+2?"


@dataclass(frozen=True)
class Chat:
    """The messages of the prompt and those written; with `truncated` the last was cut off."""

    prompt: list[Message]
    written: list[Message]
    truncated: bool = False


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _user(content: str = QUESTION) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str | None, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def _call(name: str, arguments: str) -> Message:
    function = {"name": name, "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


def _result(content: str) -> Message:
    return {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": content}


ADD = _call("add", '{"a": 2, "b": 2}')

CHATS = {
    "an answer": Chat([_user()], [_assistant("Four.")]),
    "a system message": Chat([_system("Be brief."), _user()], [_assistant("Four.")]),
    "whitespace around the answer": Chat([_user()], [_assistant(" Four. \n")]),
    "an answer that was cut off": Chat([_user()], [_assistant("It is fo")], truncated=True),
    "two turns": Chat([_user()], [_assistant("Four."), _user("And 3+3?"), _assistant("Six.")]),
    "a turn before": Chat(
        [_user("Hi!"), _assistant("Hello!"), _user()],
        [_assistant("Four.")],
    ),
    "reasoning": Chat([_user()], [_assistant("Four.", reasoning_content="2+2=4")]),
    "reasoning inside the text": Chat([_user()], [_assistant("<think>\n2+2=4\n</think>\n\nFour.")]),
    "reasoning that was cut off": Chat(
        [_user()], [_assistant("", reasoning="Let me se")], truncated=True
    ),
    "two turns with reasoning": Chat(
        [_user()],
        [
            _assistant("Four.", reasoning="2+2=4"),
            _user("And 3+3?"),
            _assistant("Six.", reasoning="3+3=6"),
        ],
    ),
    "a tool call": Chat([_user()], [_assistant(None, tool_calls=[ADD])]),
    "a tool call and its result": Chat(
        [_user()], [_assistant("", tool_calls=[ADD]), _result("4"), _assistant("Four.")]
    ),
    "a tool call after reasoning": Chat(
        [_user()], [_assistant("", reasoning="I add.", tool_calls=[ADD])]
    ),
    "a tool call after text": Chat([_user()], [_assistant("I add.", tool_calls=[ADD])]),
    "two tool calls": Chat([_user()], [_assistant("", tool_calls=[ADD, _call("now", "{}")])]),
}
