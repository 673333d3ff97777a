"""The legacy form of OpenAI's `/v1/completions` that many servers know: `echo` with `logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import msgspec

from onstream.pipeline.http import BadReply
from onstream.workers.teacher.external.protocols.base import (
    TeacherProtocol,
    decode_reply,
    scores_of_pairs,
    with_likeliest,
)
from onstream.workers.teacher.scorer import ScoreRequest, Scores, sent_ids

TOKEN_ID = "token_id:"


class _EchoLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _EchoChoice(msgspec.Struct):
    logprobs: _EchoLogprobs | None = None


class _EchoReply(msgspec.Struct):
    choices: list[_EchoChoice]


@dataclass(frozen=True)
class Echo(TeacherProtocol):
    """`/v1/completions` with `echo` and `logprobs`. Servers differ in two points.

    `named_ids` asks for tokens as `token_id:N` instead of text. Without it the k likeliest cannot
    be told apart. `max_tokens` is 0 where the server takes that, and 1 where it does not.
    """

    name: ClassVar[str] = "echo"
    path: ClassVar[str] = "/v1/completions"
    named_ids: bool = True
    max_tokens: int = 0

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """As in the base class."""
        return (cls(), cls(named_ids=False), cls(named_ids=False, max_tokens=1))

    @property
    def with_texts(self) -> TeacherProtocol | None:
        """A reply names tokens by their ids or by their texts, not by both."""
        return replace(self, named_ids=False)

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the base class."""
        body = {
            "model": model,
            "prompt": sent_ids(request),
            "max_tokens": self.max_tokens,
            "temperature": 1.0,
            "echo": True,
            "logprobs": top_k,
        }
        if self.named_ids:
            body["return_tokens_as_token_ids"] = True
        return body

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the base class.

        Tokens that come as texts are taken in order: there is nothing to look them up by.
        """
        echoed = _echoed(reply)
        start = len(request.prompt_ids)
        end = request.tokens
        if min(len(echoed.tokens), len(echoed.token_logprobs)) < end:
            raise BadReply(f"logprobs of {len(echoed.token_logprobs)} tokens for a prompt of {end}")
        names = echoed.tokens[start:end]
        if names[0].startswith(TOKEN_ID):
            ids = [_named_id(name) for name in names]
        elif top_k:
            raise BadReply("the likeliest tokens as text, which do not say their ids")
        else:
            ids = request.completion_ids.tolist()
        pairs = list(zip(ids, echoed.token_logprobs[start:end], strict=True))
        scores = scores_of_pairs(pairs, request)
        return with_likeliest(scores, _likeliest(echoed, start, end) if top_k else [], top_k)

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """As in the base class."""
        names = _echoed(reply).tokens[len(request.prompt_ids) :]
        tokens = zip(request.completion_ids.tolist(), names, strict=False)
        return {token: text for token, text in tokens if not text.startswith(TOKEN_ID)}


def _echoed(reply: bytes) -> _EchoLogprobs:
    choices = decode_reply(reply, _EchoReply).choices
    if not choices:
        raise BadReply("a reply without choices")
    logprobs = choices[0].logprobs
    if logprobs is None:
        raise BadReply("a reply without logprobs")
    return logprobs


def _likeliest(echoed: _EchoLogprobs, start: int, end: int) -> list[dict[int, float]]:
    positions = (echoed.top_logprobs or [])[start:end]
    return [
        {_named_id(name): logprob for name, logprob in (position or {}).items()}
        for position in positions
    ]


def _named_id(name: str) -> int:
    number = name.removeprefix(TOKEN_ID)
    if number == name or not number.isdigit():
        raise BadReply(f"a token called {name!r} among others that are called {TOKEN_ID}N")
    return int(number)
