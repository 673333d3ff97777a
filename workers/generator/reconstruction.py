"""From chat messages that another model wrote to tokens of the student, with a loss mask.

Pure: a tokenizer and messages in, samples out. An assistant turn is the difference between
template(messages before it) with the generation prompt and template(messages up to it), split at
their longest common token prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onstream.pipeline.images import for_template
from onstream.pipeline.records import Ids, Mask

Message = dict[str, Any]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which endpoints return, and templates read, reasoning outside the content."""


class ReconstructionError(ValueError):
    """Messages cannot become tokens of the student so that only the assistant's are trained."""


@dataclass(frozen=True)
class ReconstructedSample:
    """One sample of P prompt and C completion tokens; the assistant wrote those with mask 1.

    `text` is the content of the last assistant turn.
    """

    prompt_ids: Ids  # [P]
    completion_ids: Ids  # [C]
    loss_mask: Mask  # [C]
    text: str


class Reconstructor:
    """Renders chats with the student's tokenizer.

    `stop_ids` are the tokens that end a turn; the tokenizer's end of sequence is one of them.
    `arguments` are variables that the chat template reads.

    Raises:
        TypeError: the tokenizer has no end of sequence.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: set[int], arguments: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments or {}
        self._stop_ids = stop_ids
        self._special = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        self.reasoning_field = self._find_reasoning_field()

    def samples(
        self, prompt: Sequence[Message], written: Sequence[Message], *, truncated: bool = False
    ) -> list[ReconstructedSample]:
        """The assistant messages among `written`, which continue `prompt`, as tokens.

        Turns share a sample as long as each continues the tokens of the one before. Where the
        template renders an earlier turn differently later on (without its reasoning, say), a new
        sample begins. With `truncated` the last turn was cut off, so no end of turn is trained.

        >>> # <user>2+2?<end><assistant> | 4<end>, with the mask 1 1

        Raises:
            ReconstructionError: the messages cannot be rendered, or what the assistant wrote cannot
                be told from the rest.
        """
        samples: list[ReconstructedSample] = []
        for at, message in enumerate(written):
            if message["role"] != "assistant":
                continue
            before = [*prompt, *(self._for_template(earlier) for earlier in written[:at])]
            turn = self._turn(before, message, truncated=truncated and at == len(written) - 1)
            text = _text(message)
            continued = _continued(samples[-1], turn, text) if samples else None
            if continued is not None:
                samples[-1] = continued
                continue
            prompt_ids, turn_ids = turn
            mask = np.ones(len(turn_ids), dtype=np.uint8)
            samples.append(ReconstructedSample(prompt_ids, turn_ids, mask, text))
        if not samples:
            raise ReconstructionError("there is no assistant message")
        return samples

    def renders_reasoning(self) -> bool:
        """Whether the student's template renders reasoning that is outside the content."""
        return self.reasoning_field is not None

    def _turn(
        self, before: Sequence[Message], message: Message, *, truncated: bool
    ) -> tuple[Ids, Ids]:
        """The ids before the assistant's turn, and those of the turn, its end included."""
        self._refuse_special(message)
        opened = self._render(before, answer_next=True)
        context = self._render(before)
        text, end = self._closed(before, message, truncated=truncated)
        if not text.startswith(context):
            raise ReconstructionError(
                "the student's template renders what came before in another way "
                "once the answer follows"
            )
        opened_ids = self._ids(opened)
        ids = self._ids(text[:end] if truncated else text)
        split = _common(opened_ids, ids)
        turn = ids[split:] if truncated else self._until_end_of_turn(ids[split:])
        if not len(turn):
            raise ReconstructionError("nothing was written that the student's template renders")
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in turn:
            raise ReconstructionError(
                "the answer contains characters that the student's tokenizer has no token for"
            )
        return ids[:split], turn

    def _closed(
        self, before: Sequence[Message], message: Message, *, truncated: bool
    ) -> tuple[str, int]:
        """The chat as text with `message` as its last turn.

        Also where in it the written part ends, for a turn that was cut off.
        """
        message = self._for_template(message)
        if not any(message.get(name) for name in ("content", "tool_calls", *REASONING_FIELDS)):
            raise ReconstructionError(
                "the answer is empty, but for what the student's template does not render"
            )
        field = "content" if message.get("content") else self.reasoning_field
        has_text = field is not None and bool(message.get(field))
        if truncated and (message.get("tool_calls") or not has_text):
            raise ReconstructionError("the answer was cut off before it had any content")
        if field is None or not has_text:
            return self._render([*before, message]), 0
        return self._render_exactly(before, message, field, truncated=truncated)

    def _render_exactly(
        self, before: Sequence[Message], message: Message, field: str, *, truncated: bool
    ) -> tuple[str, int]:
        """The chat as text, with the whitespace around `message[field]` as it was written.

        Templates trim it. Signs that are no whitespace take its place while the chat is rendered,
        and one marks the end of a text that was cut off. Also returns where the text ends, if a
        sign was there.
        """
        value: str = message[field]
        head = value[: len(value) - len(value.lstrip())] if field == "content" else ""
        rest = value[len(head) :]
        tail = rest[len(rest.rstrip()) :] if field == "content" or truncated else ""
        core = rest[: len(rest) - len(tail)]
        start_sign, end_sign = self._signs(before, message)
        guarded = (start_sign if head else "") + core + (end_sign if tail or truncated else "")
        text = self._render([*before, {**message, field: guarded}]).replace(start_sign, head)
        if truncated and end_sign not in text:
            raise ReconstructionError(
                "the student's template does not show where the answer was cut off"
            )
        end = text.find(end_sign) + len(tail)
        return text.replace(end_sign, tail), end

    def _for_template(self, message: Message) -> Message:
        """An assistant's message as templates expect it.

        Its content is text, tool arguments are objects, and reasoning has the template's name.
        """
        if message["role"] != "assistant":
            return message
        ready: Message = {"role": "assistant", "content": _text(message)}
        if reasoning := self._reasoning_of(message):
            # The template itself writes the newlines between reasoning and content.
            ready["content"] = ready["content"].lstrip("\n")
            if self.reasoning_field is not None:
                ready[self.reasoning_field] = reasoning
        if message.get("tool_calls"):
            ready["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        return ready

    def _reasoning_of(self, message: Message) -> str:
        for name in REASONING_FIELDS:
            value = message.get(name)
            if isinstance(value, str):
                return value
        return ""

    def _until_end_of_turn(self, turn: Ids) -> Ids:
        """`turn` up to its end-of-turn token, which is added where the template leaves it out."""
        ends = [at for at, token in enumerate(turn.tolist()) if token in self._stop_ids]
        if not ends:
            return np.append(turn, np.int32(self._tokenizer.eos_token_id))
        return turn[: ends[0] + 1]

    def _refuse_special(self, message: Message) -> None:
        """Refuse a control token of the student in a text: it would be trained as such."""
        calls = json.dumps(message.get("tool_calls") or "", ensure_ascii=False)
        written = _text(message) + self._reasoning_of(message) + calls
        found = [token for token in self._special if token in written]
        if found:
            raise ReconstructionError(
                f"the answer contains {found[0]!r}, a control token of the student's tokenizer"
            )

    def _render(self, messages: Sequence[Message], *, answer_next: bool = False) -> str:
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

    def _ids(self, text: str) -> Ids:
        return np.array(
            self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32
        )

    def _find_reasoning_field(self) -> str | None:
        """The reasoning field that the template renders in the last turn, found by trying."""
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        for name in REASONING_FIELDS:
            try:
                if "deliberation" in self._render([chat[0], {**chat[1], name: "deliberation"}]):
                    return name
            except ReconstructionError:
                continue
        return None

    @staticmethod
    def _signs(before: Sequence[Message], message: Message) -> tuple[str, str]:
        """Two characters of Unicode's private use area that no message contains."""
        used = json.dumps([*before, message], ensure_ascii=False, default=str)
        free = (sign for sign in map(chr, range(0xE000, 0xF8FF)) if sign not in used)
        return next(free), next(free)


def _continued(
    sample: ReconstructedSample, turn: tuple[Ids, Ids], text: str
) -> ReconstructedSample | None:
    """`sample` with another turn; what lies between them has mask 0.

    None where the turn's prompt does not begin with the sample's tokens.
    """
    prompt_ids, turn_ids = turn
    so_far = np.concatenate([sample.prompt_ids, sample.completion_ids])
    if len(prompt_ids) < len(so_far) or not np.array_equal(prompt_ids[: len(so_far)], so_far):
        return None
    between = prompt_ids[len(so_far) :]
    mask = np.concatenate(
        [sample.loss_mask, np.zeros(len(between), np.uint8), np.ones(len(turn_ids), np.uint8)]
    )
    completion_ids = np.concatenate([sample.completion_ids, between, turn_ids])
    return ReconstructedSample(sample.prompt_ids, completion_ids, mask, text)


def _common(left: Ids, right: Ids) -> int:
    """The length of the longest common prefix."""
    shorter = min(len(left), len(right))
    differing = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differing[0]) if len(differing) else shorter


def _text(message: Message) -> str:
    """The message's content as one text; endpoints may give it in parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def _tool_call(call: Message) -> Message:
    """A tool call with its arguments as an object, for templates; endpoints give JSON text."""
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError as error:
            raise ReconstructionError(
                f"the arguments of a tool call are no JSON: {error}"
            ) from error
    return {**call, "function": function}
