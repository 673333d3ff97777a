"""The student's chat template: what it writes around an answer, and what it drops of one.

Pure: a tokenizer and messages in, text out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onstream.pipeline.images import for_template

Message = dict[str, Any]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which endpoints return, and templates read, reasoning outside the content."""
START_REASONING = "<think>"
CLOSE_REASONING = "</think>"
OPEN_REASONING = re.compile(r"<think>(\s*)\Z")
"""The end of a prompt that has opened the reasoning; the group is the gap before its text."""
CLOSED_REASONING = re.compile(r"</think>\s*\Z")
"""The end of a prompt after which no reasoning is written."""
SIGNS = re.compile("[\ue000-\uf8ff]")
"""Unicode's private use area, of which signs are that mark where a text begins and ends."""
SHOWN_CHARACTERS = 40
_QUESTION = {"role": "user", "content": "question"}


class ReconstructionError(ValueError):
    """Messages cannot become tokens of the student so that only the assistant's are trained."""


@dataclass(frozen=True)
class TurnText:
    """An assistant's turn: the prompt that the student would get, and what it would write then.

    `written` includes what the template puts behind the last message.
    """

    prompt: str
    written: str


class ChatTemplate:
    """The template of `tokenizer`, with its habits, which are found by trying.

    `arguments` are variables that it reads.
    `reasoning_field` is where it reads reasoning that it renders; None where there is none.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments
        prompt = self._try([_QUESTION], answer_next=True) or ""
        self._closes_reasoning = CLOSED_REASONING.search(prompt) is not None
        self._opens_reasoning = OPEN_REASONING.search(prompt) is not None
        self.reasoning_field = None if self._closes_reasoning else self._find_reasoning_field()
        self._arguments_as_text = self._takes_arguments_as_text()

    def renders_reasoning(self) -> bool:
        """Whether an answer has a place for reasoning."""
        return self.reasoning_field is not None or self._opens_reasoning

    def render(self, messages: Sequence[Message], *, answer_next: bool = False) -> str:
        """The chat as text, with `answer_next` up to where the answer begins.

        Raises:
            ReconstructionError: the template refuses the chat.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                for_template(messages),
                add_generation_prompt=answer_next,
                tokenize=False,
                **self._arguments,
            )
        except Exception as error:  # templates raise anything: jinja's errors, TypeError, …
            raise ReconstructionError(
                f"the student's template cannot render the chat: {error}"
            ) from error
        return text

    def for_template(self, message: Message) -> Message:
        """An assistant's message as the template expects it.

        Its content is text, tool arguments are an object (or JSON text), and reasoning has the name
        that the template knows.
        """
        if message["role"] != "assistant":
            return message
        reasoning, content = self.parts(message)
        ready: Message = {"role": "assistant", "content": content}
        if reasoning and self.reasoning_field is not None:
            ready[self.reasoning_field] = reasoning
        if message.get("tool_calls"):
            ready["tool_calls"] = [
                _tool_call(call, as_text=self._arguments_as_text) for call in message["tool_calls"]
            ]
        return ready

    def parts(self, message: Message) -> tuple[str, str]:
        """The reasoning and the content of an assistant's message.

        Reasoning that an endpoint left in the content is told apart, for templates of models that
        reason.
        """
        content = message_text(message)
        reasoning = reasoning_of(message)
        if not reasoning and (self.renders_reasoning() or self._closes_reasoning):
            reasoning, content = _split_reasoning(content)
        # The template itself writes the newlines between reasoning and content.
        return reasoning, content.lstrip("\n") if reasoning else content

    def turn(self, before: Sequence[Message], message: Message, *, truncated: bool) -> TurnText:
        """The assistant's `message` after `before`, whose messages are `for_template` already.

        With `truncated` it was cut off, and ends where it was.

        Raises:
            ReconstructionError: the template refuses the chat, drops a part of the message, or does
                not go on from its own generation prompt.
        """
        reasoning, content = self.parts(message)
        ready = self.for_template(message)
        _require_answer(
            content,
            reasoning if self.renders_reasoning() else "",
            message.get("tool_calls") or [],
            truncated=truncated,
        )
        prompt = self.render(before, answer_next=True)
        if truncated and not content and OPEN_REASONING.search(prompt):
            return TurnText(prompt, reasoning.lstrip("\n"))
        guarded = self._guard(before, ready, truncated=truncated)
        finished = self.render([*before, guarded.message])
        written = self._after_prompt(before, prompt, finished, reasoning)
        self._require_whole(before, ready, reasoning, written, guarded)
        return TurnText(prompt, guarded.without_signs(written, cut=truncated))

    def _guard(self, before: Sequence[Message], ready: Message, *, truncated: bool) -> _Guarded:
        """`ready` with signs that are no whitespace around its text, which templates trim."""
        signs = _free_signs([*before, ready])
        if ready["content"]:
            return _guarded(ready, "content", next(signs), next(signs))
        field = self.reasoning_field
        if truncated and field is not None and ready.get(field):
            return _guarded(ready, field, "", next(signs))
        return _Guarded(ready, "", "", "", "")

    def _after_prompt(
        self, before: Sequence[Message], prompt: str, finished: str, reasoning: str
    ) -> str:
        """What follows `prompt` in the finished chat.

        Two habits of templates are allowed for:
        - A prompt opens reasoning that the finished chat does not show: DeepSeek-R1's distillates
          and QwQ drop it from every answer. The student has to close it all the same.
        - What came before has another place once an answer follows: Mistral's system message is
          shown before the last user message alone.
        """
        if finished.startswith(prompt):
            return finished[len(prompt) :]
        opened = OPEN_REASONING.search(prompt)
        if opened is not None and finished.startswith(prompt[: opened.start()]):
            return _with_reasoning(reasoning, opened[1], finished[opened.start() :])
        answered = self._answered(before)
        if finished.startswith(answered) and answered.endswith(_last_turn(before, prompt)):
            return finished[len(answered) :]
        raise self._misfit(before, prompt, finished)

    def _answered(self, before: Sequence[Message]) -> str:
        """The chat up to where an answer begins, as it is once there is one."""
        sign = next(_free_signs(before))
        text, _, _ = self.render([*before, {"role": "assistant", "content": sign}]).partition(sign)
        return text

    def _misfit(self, before: Sequence[Message], prompt: str, finished: str) -> ReconstructionError:
        """Why the finished chat does not begin with the prompt."""
        history = _common_prefix(prompt, self.render(before))
        if not finished.startswith(history):
            return ReconstructionError(
                "the student's template renders what came before in another way "
                "once the answer follows"
            )
        finished = SIGNS.sub("", finished)
        at = len(_common_prefix(prompt, finished))
        return ReconstructionError(
            f"the student's template ends the prompt with {prompt[at:]!r}, where the finished chat "
            f"has {finished[at : at + SHOWN_CHARACTERS]!r}"
        )

    def _require_whole(
        self,
        before: Sequence[Message],
        ready: Message,
        reasoning: str,
        written: str,
        guarded: _Guarded,
    ) -> None:
        """Refuse a message of which the template drops a part: the rest would be trained alone."""
        only_space = "tool_calls" in ready and not ready["content"].strip()
        if not only_space and not guarded.is_in(written):
            raise ReconstructionError("the student's template drops the content of the answer")
        if reasoning.strip() not in written and self.renders_reasoning():
            raise ReconstructionError("the student's template drops the reasoning of the answer")
        if "tool_calls" in ready and not self._shows_tool_calls(before, ready):
            raise ReconstructionError("the student's template drops a tool call of the answer")

    def _shows_tool_calls(self, before: Sequence[Message], ready: Message) -> bool:
        """Whether each tool call is rendered, found with words that stand nowhere else."""
        calls = ready["tool_calls"]
        asked = [
            _probe_call(number, call, as_text=self._arguments_as_text)
            for number, call in enumerate(calls)
        ]
        text = self.render([*before, {**ready, "tool_calls": asked}])
        return all(_shows_probe(text, number) for number in range(len(calls)))

    def _find_reasoning_field(self) -> str | None:
        """The reasoning field that the template renders in the last turn."""
        answer = {"role": "assistant", "content": "answer"}
        for name in REASONING_FIELDS:
            chat = [_QUESTION, {**answer, name: "deliberation"}]
            if "deliberation" in (self._try(chat) or ""):
                return name
        return None

    def _takes_arguments_as_text(self) -> bool:
        """Whether the template renders tool calls only if their arguments are JSON text."""
        return not self._shows_probe_call(as_text=False) and self._shows_probe_call(as_text=True)

    def _shows_probe_call(self, *, as_text: bool) -> bool:
        call = _probe_call(0, {"id": "abcdefghi", "type": "function"}, as_text=as_text)
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return _shows_probe(self._try([_QUESTION, answer]) or "", 0)

    def _try(self, chat: Sequence[Message], *, answer_next: bool = False) -> str | None:
        """The chat as text; None where the template refuses it."""
        try:
            return self.render(chat, answer_next=answer_next)
        except ReconstructionError:
            return None


@dataclass(frozen=True)
class _Guarded:
    """A message, one of whose texts has signs in place of the whitespace around it.

    Without a text to guard, all four are empty.
    """

    message: Message
    start_sign: str
    end_sign: str
    head: str
    tail: str

    def is_in(self, text: str) -> bool:
        """Whether both ends of the guarded text are in `text`."""
        return self.start_sign in text and self.end_sign in text

    def without_signs(self, text: str, *, cut: bool) -> str:
        """`text` with the whitespace as it was written; with `cut`, no further than its end."""
        if cut:
            text = text[: text.index(self.end_sign) + len(self.end_sign)]
        for sign, space in ((self.start_sign, self.head), (self.end_sign, self.tail)):
            if sign:
                text = text.replace(sign, space)
        return text


def _guarded(ready: Message, field: str, start_sign: str, end_sign: str) -> _Guarded:
    value: str = ready[field]
    core = value.lstrip() if start_sign else value
    head = value[: len(value) - len(core)]
    tail = core[len(core.rstrip()) :]
    core = core.rstrip()
    message = {**ready, field: start_sign + core + end_sign}
    return _Guarded(message, start_sign, end_sign, head, tail)


def _free_signs(messages: Sequence[Message]) -> Iterator[str]:
    """Signs that no message contains."""
    used = json.dumps(list(messages), ensure_ascii=False, default=str)
    return (sign for sign in map(chr, range(0xE000, 0xF8FF)) if sign not in used)


def _require_answer(
    content: str, reasoning: str, tool_calls: Sequence[Message], *, truncated: bool
) -> None:
    if not (content or reasoning or tool_calls):
        raise ReconstructionError(
            "the answer is empty, but for what the student's template does not render"
        )
    if truncated and (tool_calls or not (content or reasoning)):
        raise ReconstructionError("the answer was cut off before it had any content")


def _split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning that a content begins with, and what follows it.

    The reasoning may lack its opening, which was the prompt's, or its end, if it was cut off.
    """
    before, closed, after = content.partition(CLOSE_REASONING)
    opened = before.lstrip().startswith(START_REASONING)
    if not closed and not opened:
        return "", content
    reasoning = before.lstrip().removeprefix(START_REASONING).lstrip("\n")
    return reasoning.rstrip("\n") if closed else reasoning, after


def _with_reasoning(reasoning: str, gap: str, answer: str) -> str:
    """`answer` behind the reasoning that the prompt has opened, as models write it.

    The answer may have a block of reasoning itself, with less space in it: Nemotron 3 writes an
    empty one as `<think></think>`, and asks for one with `<think>` and a newline.
    """
    answer = answer.removeprefix(START_REASONING)
    if answer.startswith(CLOSE_REASONING):
        return answer
    return reasoning.strip("\n") + gap + CLOSE_REASONING + gap * 2 + answer


def _last_turn(before: Sequence[Message], prompt: str) -> str:
    """The end of `prompt`, from the text of its last message on; all of it without a text."""
    text = message_text(before[-1]).strip() if before else ""
    return prompt[prompt.rfind(text) :] if text and text in prompt else prompt


def _common_prefix(left: str, right: str) -> str:
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return left[:at]
    return min(left, right, key=len)


def message_text(message: Message) -> str:
    """The message's content as one text; endpoints may give it in parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def reasoning_of(message: Message) -> str:
    """The reasoning that a message has outside of its content."""
    for name in REASONING_FIELDS:
        value = message.get(name)
        if isinstance(value, str):
            return value
    return ""


def _tool_call(call: Message, *, as_text: bool) -> Message:
    """A tool call with its arguments as the template takes them; endpoints give JSON text."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ReconstructionError(
                f"the arguments of a tool call are no JSON: {error}"
            ) from error
    if as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _probe_call(number: int, call: Message, *, as_text: bool) -> Message:
    """`call` with words for its name and arguments by which it is found in a rendered chat."""
    arguments = {f"argument{number}named": f"value{number}given"}
    function = {"name": f"function{number}called", "arguments": arguments}
    return _tool_call({**call, "function": function}, as_text=as_text)


def _shows_probe(text: str, number: int) -> bool:
    """Whether the probe call of that number is in `text`, its arguments not as Python's repr."""
    words = (f"function{number}called", f"argument{number}named", f"value{number}given")
    return all(word in text for word in words) and f"'{words[1]}'" not in text
