"""The four ways in which servers are asked for the logprobs of tokens that they did not write.

Each is a pure function of the request and of the reply's bytes. Whatever a server returns is looked
up by token id: a position of vLLM's reply holds the k likeliest tokens and the actual one in no
order worth trusting.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from onstream.pipeline.http import BadReply, RequestRefused
from onstream.settings.decoding import UNDECODABLE
from onstream.workers.teacher.scorer import ScoreRequest, Scores

TOKEN_ID = "token_id:"
Position = Mapping[int, float]  # token id -> logprob


class TeacherProtocol(Protocol):
    """How a server is asked."""

    @property
    def name(self) -> str:
        """What `orchestrator.teacher_model.client.protocol` calls it."""
        ...

    @property
    def path(self) -> str:
        """Where the request goes, from the server's root."""
        ...

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """The JSON to send."""
        ...

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """The completion's scores.

        Raises:
            BadReply: the reply is not what was asked for.
        """
        ...

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """The completion's token ids with their text, as far as the server gives it.

        Raises:
            BadReply: the reply is not what was asked for.
        """
        ...


class _Entry(msgspec.Struct):
    logprob: float
    decoded_token: str | None = None


_PromptLogprobs = list[dict[int, _Entry] | None]


class _Generated(msgspec.Struct):
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: _PromptLogprobs | None = None


class _EchoLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    prompt_logprobs: _PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _EchoLogprobs | None = None


class _Completions(msgspec.Struct):
    choices: list[_Choice]


_SglangToken = tuple[float | None, int, str | None]


class _SglangMeta(msgspec.Struct):
    input_token_logprobs: list[_SglangToken]
    input_top_logprobs: list[list[_SglangToken] | None] | None = None


class _Sglang(msgspec.Struct):
    meta_info: _SglangMeta


@dataclass(frozen=True)
class VllmGenerate:
    """vLLM's token-in, token-out route. The server needs `--enable-scale-out`."""

    name: str = "vllm-generate"
    path: str = "/inference/v1/generate"

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the protocol; one token is generated, since vLLM takes no less."""
        sampling = {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": top_k,
            "detokenize": False,
        }
        return {
            "model": model,
            "token_ids": _ids(request),
            "sampling_params": sampling,
            **(request.sent or {}),
        }

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the protocol.

        Raises:
            RequestRefused: the server makes other tokens of the images than the student's processor.
        """
        generated = _decoded(reply, _Generated)
        if request.sent is not None and generated.prompt_token_ids != _ids(request):
            made = len(generated.prompt_token_ids or ())
            raise RequestRefused(
                f"of a sample with {len(request.images)} images it makes {made} tokens that are not the student's {request.tokens}"
            )
        return _from_positions(generated.prompt_logprobs, request, top_k)

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """None: this route returns ids alone."""
        return {}


@dataclass(frozen=True)
class VllmCompletions:
    """vLLM's `/v1/completions` with its `prompt_logprobs` field."""

    name: str = "vllm-completions"
    path: str = "/v1/completions"

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the protocol; one token is generated, since vLLM takes no less."""
        return {
            "model": model,
            "prompt": _ids(request),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": top_k,
        }

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the protocol."""
        return _from_positions(_choice(reply).prompt_logprobs, request, top_k)

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """As in the protocol."""
        positions = (_choice(reply).prompt_logprobs or [])[len(request.prompt_ids) :]
        entries = zip(request.completion_ids.tolist(), positions, strict=False)
        found = {
            token: position[token].decoded_token
            for token, position in entries
            if position and token in position
        }
        return {token: text for token, text in found.items() if text is not None}


@dataclass(frozen=True)
class Echo:
    """The legacy form of `/v1/completions`: `echo` with `logprobs`.

    Servers differ in two points. `named_ids` asks for tokens as `token_id:N` instead of text,
    without which the k likeliest cannot be told apart; `max_tokens` is 0 where the server takes
    that, and 1 where it does not.
    """

    named_ids: bool = True
    max_tokens: int = 0
    name: str = "echo"
    path: str = "/v1/completions"

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the protocol."""
        asked = {
            "model": model,
            "prompt": _ids(request),
            "max_tokens": self.max_tokens,
            "temperature": 1.0,
            "echo": True,
            "logprobs": top_k,
        }
        return asked | ({"return_tokens_as_token_ids": True} if self.named_ids else {})

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the protocol. Tokens that come as text are taken in order: there is nothing to look
        them up by.
        """
        given = _echoed(reply)
        start = len(request.prompt_ids)
        end = request.tokens
        if min(len(given.tokens), len(given.token_logprobs)) < end:
            raise BadReply(f"logprobs of {len(given.token_logprobs)} tokens for a prompt of {end}")
        if not given.tokens[start].startswith(TOKEN_ID):
            if top_k:
                raise BadReply("the likeliest tokens as text, which do not say their ids")
            return _from_pairs(
                list(
                    zip(
                        request.completion_ids.tolist(),
                        given.token_logprobs[start:end],
                        strict=True,
                    )
                ),
                request,
            )
        named = [_named(token) for token in given.tokens[start:end]]
        scores = _from_pairs(
            list(zip(named, given.token_logprobs[start:end], strict=True)), request
        )
        tops = (given.top_logprobs or [])[start:end] if top_k else []
        return _with_top(
            scores,
            [{_named(token): logprob for token, logprob in (top or {}).items()} for top in tops],
            top_k,
        )

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """As in the protocol."""
        tokens = zip(
            request.completion_ids.tolist(),
            _echoed(reply).tokens[len(request.prompt_ids) :],
            strict=False,
        )
        return {token: text for token, text in tokens if not text.startswith(TOKEN_ID)}


@dataclass(frozen=True)
class Sglang:
    """SGLang's `/generate` with the logprobs of its input. Written to its documented interface; no
    SGLang server was at hand.
    """

    name: str = "sglang"
    path: str = "/generate"

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the protocol. Logprobs begin at the prompt's last token; versions differ in whether
        that one is listed.
        """
        return {
            "model": model,
            "input_ids": _ids(request),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(request.prompt_ids) - 1,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": True,
        }

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the protocol; the completion's tokens are the last ones listed."""
        meta = _decoded(reply, _Sglang).meta_info
        count = len(request.completion_ids)
        scores = _from_pairs(
            [(token, logprob) for logprob, token, _ in meta.input_token_logprobs[-count:]], request
        )
        tops = (meta.input_top_logprobs or [])[-count:] if top_k else []
        return _with_top(
            scores,
            [{token: lp for lp, token, _ in top or () if lp is not None} for top in tops],
            top_k,
        )

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """As in the protocol."""
        listed = _decoded(reply, _Sglang).meta_info.input_token_logprobs[
            -len(request.completion_ids) :
        ]
        return {token: text for _, token, text in listed if text is not None}


SHOWN_IMAGES = VllmGenerate.name
"""The protocol that carries images."""
VARIANTS: tuple[TeacherProtocol, ...] = (
    VllmGenerate(),
    VllmCompletions(),
    Echo(),
    Echo(named_ids=False),
    Echo(named_ids=False, max_tokens=1),
    Sglang(),
)
"""Every form that the probe tries, in order; those of one name are variants of one protocol."""


def _ids(request: ScoreRequest) -> list[int]:
    return [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]


def _decoded(reply: bytes, form: type[Any]) -> Any:
    try:
        return msgspec.json.decode(reply, type=form)
    except UNDECODABLE as error:
        raise BadReply(f"the reply does not have the protocol's form ({error})") from error


def _choice(reply: bytes) -> _Choice:
    choices: list[_Choice] = _decoded(reply, _Completions).choices
    if not choices:
        raise BadReply("a reply without choices")
    return choices[0]


def _echoed(reply: bytes) -> _EchoLogprobs:
    logprobs = _choice(reply).logprobs
    if logprobs is None:
        raise BadReply("a reply without logprobs")
    return logprobs


def _named(token: str) -> int:
    number = token.removeprefix(TOKEN_ID)
    if number == token or not number.isdigit():
        raise BadReply(f"a token called {token!r} among others that are called {TOKEN_ID}N")
    return int(number)


def _from_positions(positions: _PromptLogprobs | None, request: ScoreRequest, top_k: int) -> Scores:
    """The scores in a `prompt_logprobs` list: one dict a token of the prompt and completion, None
    for the first.
    """
    if positions is None:
        raise BadReply("a reply without prompt_logprobs")
    if len(positions) != request.tokens:
        raise BadReply(f"logprobs of {len(positions)} tokens for a prompt of {request.tokens}")
    given = [
        {token: entry.logprob for token, entry in (position or {}).items()}
        for position in positions[len(request.prompt_ids) :]
    ]
    pairs = [
        (token if token in position else next(iter(position), None), position.get(token))
        for token, position in zip(request.completion_ids.tolist(), given, strict=True)
    ]
    return _with_top(_from_pairs(pairs, request), given, top_k)


def _from_pairs(pairs: Sequence[tuple[int | None, float | None]], request: ScoreRequest) -> Scores:
    """Scores from the token id and logprob of each completion token, the ids checked."""
    wanted = request.completion_ids.tolist()
    if len(pairs) != len(wanted):
        raise BadReply(f"logprobs of {len(pairs)} tokens for a completion of {len(wanted)}")
    logprobs = np.empty(len(wanted), dtype=np.float32)
    for at, ((token, logprob), ours) in enumerate(zip(pairs, wanted, strict=True)):
        if token != ours:
            raise BadReply(
                f"token {token} where token {ours} was sent, at position {at} of the completion"
            )
        if logprob is None or not math.isfinite(logprob):
            raise BadReply(f"logprob {logprob} for token {ours} at position {at} of the completion")
        logprobs[at] = logprob
    return Scores(logprobs)


def _with_top(scores: Scores, positions: Sequence[Position], top_k: int) -> Scores:
    """`scores` with the k likeliest tokens of each of `positions`, likeliest first. The tail is the
    trainer's to compute.
    """
    if top_k == 0:
        return scores
    if len(positions) != len(scores.logprobs):
        raise BadReply(
            f"the likeliest tokens of {len(positions)} positions for a completion of {len(scores.logprobs)}"
        )
    ids = np.empty((len(positions), top_k), dtype=np.int32)
    logprobs = np.empty((len(positions), top_k), dtype=np.float32)
    for at, position in enumerate(positions):
        likeliest = heapq.nlargest(top_k, position.items(), key=lambda item: item[1])
        if len(likeliest) < top_k:
            raise BadReply(
                f"{len(likeliest)} likeliest tokens at position {at} of the completion where {top_k} were asked for"
            )
        ids[at], logprobs[at] = zip(*likeliest, strict=True)
    return Scores(scores.logprobs, ids, logprobs)
