"""From chat messages that another model wrote to tokens of the student, with a loss mask.

Pure: a tokenizer and messages in, samples out. An assistant turn is what follows
template(messages before it), which ends in the generation prompt, in template(messages up to it).
Its prompt has the very tokens that the student gets when it writes itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onstream.pipeline.records import Ids, Mask
from onstream.workers.generator.chat_template import (
    ChatTemplate,
    Message,
    ReconstructionError,
    TurnText,
    message_text,
)


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
        self._stop_ids = stop_ids
        self._special = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        self.template = ChatTemplate(tokenizer, arguments or {})

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
            before = [*prompt, *(self.template.for_template(earlier) for earlier in written[:at])]
            turn = self._turn(before, message, truncated=truncated and at == len(written) - 1)
            text = message_text(message)
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

    def _turn(
        self, before: Sequence[Message], message: Message, *, truncated: bool
    ) -> tuple[Ids, Ids]:
        """The ids before the assistant's turn, and those of the turn, its end included."""
        self._refuse_special(message)
        text = self.template.turn(before, message, truncated=truncated)
        prompt_ids = self._ids(text.prompt)
        turn = self._ids_after(prompt_ids, text)
        if not truncated:
            turn = self._until_end_of_turn(turn)
        if not len(turn):
            raise ReconstructionError("nothing was written that the student's tokenizer knows")
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in turn:
            raise ReconstructionError(
                "the answer contains characters that the student's tokenizer has no token for"
            )
        return prompt_ids, turn

    def _ids_after(self, prompt_ids: Ids, text: TurnText) -> Ids:
        """The tokens of what was written, which follow those of the prompt.

        Where one token would span the end of the prompt and the beginning of the answer, the answer
        has tokens of its own: the student gets the prompt whole, and goes on from there.
        """
        whole = self._ids(text.prompt + text.written)
        if np.array_equal(whole[: len(prompt_ids)], prompt_ids):
            return whole[len(prompt_ids) :]
        for apart in self._ids_apart(text.written):
            joined = np.concatenate([prompt_ids, apart])
            if self._decoded(joined) == self._decoded(whole):
                return apart
        raise ReconstructionError(
            "the student's tokenizer has no tokens for the answer that follow those of the prompt"
        )

    def _ids_apart(self, written: str) -> Iterator[Ids]:
        """The tokens of `written` alone, and those behind something that they do not join.

        Tokenizers of the SentencePiece kind put a space before a text: some only at its very
        beginning, some behind every control token.
        """
        for anchor in ("", self._tokenizer.eos_token, "\n"):
            before = self._ids(anchor)
            both = self._ids(anchor + written)
            if np.array_equal(both[: len(before)], before):
                yield both[len(before) :]

    def _until_end_of_turn(self, turn: Ids) -> Ids:
        """`turn` up to its end-of-turn token, which is added where the template leaves it out."""
        ends = [at for at, token in enumerate(turn.tolist()) if token in self._stop_ids]
        if not ends:
            return np.append(turn, np.int32(self._tokenizer.eos_token_id))
        return turn[: ends[0] + 1]

    def _refuse_special(self, message: Message) -> None:
        """Refuse a control token of the student in a text: it would be trained as such."""
        calls = json.dumps(message.get("tool_calls") or "", ensure_ascii=False)
        written = "".join(self.template.parts(message)) + calls
        found = [token for token in self._special if token in written]
        if found:
            raise ReconstructionError(
                f"the answer contains {found[0]!r}, a control token of the student's tokenizer"
            )

    def _ids(self, text: str) -> Ids:
        return np.array(
            self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32
        )

    def _decoded(self, ids: Ids) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        return text


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
