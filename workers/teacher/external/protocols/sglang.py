"""SGLang's `/generate`. Written to its documented interface; it has never met an SGLang server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from onstream.workers.teacher.external.protocols.base import (
    TeacherProtocol,
    decode_reply,
    scores_of_pairs,
    with_likeliest,
)
from onstream.workers.teacher.scorer import ScoreRequest, Scores, sent_ids

_Token = tuple[float | None, int, str | None]  # logprob, id, text


class _MetaInfo(msgspec.Struct):
    input_token_logprobs: list[_Token]
    input_top_logprobs: list[list[_Token] | None] | None = None


class _SglangReply(msgspec.Struct):
    meta_info: _MetaInfo


@dataclass(frozen=True)
class Sglang(TeacherProtocol):
    """SGLang's `/generate` with the logprobs of its input."""

    name: ClassVar[str] = "sglang"
    path: ClassVar[str] = "/generate"

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the base class.

        Logprobs begin at the prompt's last token; versions differ in whether they list that one.
        """
        return {
            "model": model,
            "input_ids": sent_ids(request),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(request.prompt_ids) - 1,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": True,
        }

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the base class. The completion's tokens are the last ones listed."""
        meta = decode_reply(reply, _SglangReply).meta_info
        count = len(request.completion_ids)
        pairs = [(token, logprob) for logprob, token, _ in meta.input_token_logprobs[-count:]]
        scores = scores_of_pairs(pairs, request)
        positions = (meta.input_top_logprobs or [])[-count:] if top_k else []
        return with_likeliest(scores, [_by_id(position) for position in positions], top_k)

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """As in the base class."""
        meta = decode_reply(reply, _SglangReply).meta_info
        tokens = meta.input_token_logprobs[-len(request.completion_ids) :]
        return {token: text for _, token, text in tokens if text is not None}


def _by_id(position: list[_Token] | None) -> dict[int, float]:
    return {token: logprob for logprob, token, _ in position or () if logprob is not None}
