"""Tools: functions that the student may call, how it is told of them, and how it calls one.

A call stands in the student's text as Qwen and Hermes write it, and is read from the text alone:

    <tool_call>
    {"name": "calculate", "arguments": {"expression": "2 + 2"}}
    </tool_call>
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

import msgspec

from onstream.pipeline.environments.base import Tool
from onstream.pipeline.tasks.base import Message

ASKED_FOR = re.compile(r"<tool_call>\s*\{")
"""What a chat template says that asks for calls in this form; others want XML in their place."""
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"^\s+(\w+)\s*(?:\([^)]*\))?:\s*(.+)$")
MAX_RESULT_CHARACTERS = 10_000
"""What is kept of a tool's result: an episode has a bound."""


class _Call(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any] = {}


_decode_call = msgspec.json.Decoder(_Call).decode


class ToolError(ValueError):
    """A function cannot be a tool."""


def tool_schema(tool: Tool) -> dict[str, Any]:
    """What a chat template is told of `tool`: its signature as a JSON schema, and its docstring.

    The docstring says what it does, and under `Args:` what each parameter is.

    Raises:
        ToolError: it has no docstring, or a parameter without a type or of one that JSON has not.
    """
    description, described = _docstring(tool)
    _, schemas = msgspec.json.schema_components([_arguments_type(tool)])
    [parameters] = (dict(schema) for schema in schemas.values())
    parameters.pop("title")
    properties = parameters.get("properties", {})
    for name, text in described.items():
        if name in properties:
            properties[name] = {**properties[name], "description": text}
    return {
        "type": "function",
        "function": {
            "name": tool.__name__,
            "description": description,
            "parameters": parameters,
        },
    }


def call_tools(message: Message, tools: Sequence[Tool]) -> list[Message]:
    """Do the calls in `message`; returns a message with the role `tool` for each, in order.

    What is wrong with a call, and what a tool raises, is told in its message, for the student.
    """
    by_name = {tool.__name__: tool for tool in tools}
    texts = _CALL.findall(message["content"])
    return [{"role": "tool", "content": _result(text, by_name)} for text in texts]


def _result(text: str, tools: dict[str, Tool]) -> str:
    try:
        call = _decode_call(text.strip())
    except msgspec.MsgspecError as error:
        return f"error: the call is not a JSON object with a name and arguments: {error}"
    tool = tools.get(call.name)
    if tool is None:
        return f"error: there is no tool {call.name!r}; there are {', '.join(tools) or 'none'}"
    try:
        arguments = msgspec.convert(call.arguments, _arguments_type(tool))
        result = tool(**{name: getattr(arguments, name) for name in arguments.__struct_fields__})
        shown = result if isinstance(result, str) else msgspec.json.encode(result).decode()
    except Exception as error:  # a tool is the user's own code, and may raise anything
        shown = f"error: {type(error).__name__}: {error}"
    return shown[:MAX_RESULT_CHARACTERS]


def _arguments_type(tool: Tool) -> type[msgspec.Struct]:
    """A type with the parameters of `tool` as its fields, by which calls are checked."""
    hints = get_type_hints(tool)
    fields: list[Any] = []
    for name, parameter in inspect.signature(tool).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolError(f"{tool.__name__} takes *{name}; expected named parameters alone")
        if name not in hints:
            raise ToolError(f"parameter {name!r} of {tool.__name__} has no type")
        default = () if parameter.default is parameter.empty else (parameter.default,)
        fields.append((name, hints[name], *default))
    try:
        return msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)
    except TypeError as error:
        raise ToolError(f"the parameters of {tool.__name__}: {error}") from error


def _docstring(tool: Tool) -> tuple[str, dict[str, str]]:
    """What `tool` does, and what each of its parameters is."""
    text = inspect.getdoc(tool)
    if not text:
        raise ToolError(f"{tool.__name__} has no docstring; expected what the student should know")
    description, _, rest = text.partition("\nArgs:\n")
    described = {}
    for line in rest.splitlines():
        if not line.strip():
            break
        if found := _ARGUMENT.match(line):
            described[found[1]] = found[2]
    return description.strip(), described
