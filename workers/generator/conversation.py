"""The tokens of a conversation that goes on: what follows those that were sampled.

Pure: a tokenizer and messages in, token ids out. What was sampled keeps its ids. What the template
puts behind a turn of the student, up to its next one, is found in the rendered text, by the
longest-common-prefix rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onstream.pipeline.environments.tools import ASKED_FOR
from onstream.pipeline.errors import UserError
from onstream.pipeline.images import Message
from onstream.pipeline.records import Ids

HEAD_SIGN = "\ue000"
TAIL_SIGN = "\ue001"
"""Unicode's private use area: no text has them, and no template trims them."""
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "probe description",
        "parameters": {"type": "object", "properties": {}},
    },
}
_NEXT_STEP = "Choose a student whose template does, or set model.chat_template to one."


class Conversation:
    """Renders conversations with the chat template of `tokenizer`, given its `arguments`."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments

    def require_turns(self) -> None:
        """Check that the template renders several turns.

        Raises:
            UserError: it refuses them, or shows only some.
        """
        chat = [
            {"role": "user", "content": "first question"},
            {"role": "assistant", "content": "first answer"},
            {"role": "user", "content": "second question"},
        ]
        self._require_shown(chat, [], ["first question", "first answer", "second question"])

    def require_tools(self) -> None:
        """Check that the template tells of tools, asks for calls as they are read, and shows
        results.

        Raises:
            UserError: it does not.
        """
        call = json.dumps({"name": "probe_function", "arguments": {}})
        chat = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
            {"role": "tool", "content": "probe result"},
        ]
        told = self._require_shown(chat[:1], [_PROBE_TOOL], ["probe description"])
        if not ASKED_FOR.search(told):
            raise UserError(
                "the student's chat template asks for tool calls in another form",
                expected='<tool_call>{"name": …, "arguments": …}</tool_call>, as Qwen3 and Hermes',
                next_step=_NEXT_STEP,
            )
        self._require_shown(chat, [_PROBE_TOOL], ["probe result"])

    def _require_shown(
        self, chat: list[Message], tools: list[dict[str, Any]], words: Sequence[str]
    ) -> str:
        """The chat as text, where it has all of the `words`."""
        what = "tools" if tools else "several turns"
        try:
            text = self._render(chat, tools)
        except Exception as error:  # templates raise anything: jinja's errors, TypeError, …
            raise UserError(
                f"the student's chat template cannot render {what}: {error}",
                expected=f"a template that renders {what}: task.environment needs them",
                next_step=_NEXT_STEP,
            ) from error
        for word in words:
            if word not in text:
                raise UserError(
                    f"the student's chat template leaves out {word!r} of a chat with {what}",
                    expected=f"a template that renders {what}: task.environment needs them",
                    next_step=_NEXT_STEP,
                )
        return text

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Ids:
        """The whole conversation, up to where the next turn begins."""
        return self._ids(self._render(messages, tools))

    def between(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], end: int
    ) -> Ids | None:
        """The ids between the last turn of the student, which ended with the id `end`, and its
        next.

        None where the template writes what came before in another way by now: it drops earlier
        reasoning, say, or ends a turn with another token.
        """
        messages = [_guarded(message) for message in messages]
        last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
        end_text = self._tokenizer.decode([end])
        before = self._render(messages[:last], tools) + messages[last]["content"] + end_text
        whole = self._render(messages, tools)
        if not whole.startswith(before):
            return None
        # Behind the token that stands before it: some tokenizers put a space before a text.
        ids = self._ids(end_text + whole[len(before) :])
        return ids[1:] if len(ids) > 1 and ids[0] == end else None

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **self._arguments,
        )
        return text

    def _ids(self, text: str) -> Ids:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array(ids, dtype=np.int32)


def _guarded(message: Message) -> Message:
    """A message of the student with signs for the white space around its text, which templates trim
    although it was sampled.
    """
    if message["role"] != "assistant":
        return message
    content = message["content"]
    if content[:1].isspace():
        content = HEAD_SIGN + content.lstrip()
    if content[-1:].isspace():
        content = content.rstrip() + TAIL_SIGN
    return {**message, "content": content}
