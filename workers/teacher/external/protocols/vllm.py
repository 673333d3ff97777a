"""vLLM's two routes that give the logprobs of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from onstream.pipeline.http import BadReply, RequestRefused
from onstream.workers.teacher.external.protocols.base import (
    TeacherProtocol,
    decode_reply,
    scores_of_pairs,
    with_likeliest,
)
from onstream.workers.teacher.scorer import ScoreRequest, Scores, sent_ids


class _TokenEntry(msgspec.Struct):
    logprob: float
    decoded_token: str | None = None


_PromptLogprobs = list[dict[int, _TokenEntry] | None]


class _VllmGenerateReply(msgspec.Struct):
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: _PromptLogprobs | None = None


class _VllmCompletionsChoice(msgspec.Struct):
    prompt_logprobs: _PromptLogprobs | None = None


class _VllmCompletionsReply(msgspec.Struct):
    choices: list[_VllmCompletionsChoice]


@dataclass(frozen=True)
class VllmGenerate(TeacherProtocol):
    """vLLM's token-in, token-out route. The server needs `--enable-scale-out`."""

    name: ClassVar[str] = "vllm-generate"
    path: ClassVar[str] = "/inference/v1/generate"
    carries_images: ClassVar[bool] = True

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the base class. One token is generated, since vLLM takes no less."""
        sampling = {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": top_k,
            "detokenize": False,
        }
        body = {"model": model, "token_ids": sent_ids(request), "sampling_params": sampling}
        return body | dict(request.image_fields or {})

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the base class.

        Raises:
            RequestRefused: the server makes other tokens of the images than the student's
                processor.
        """
        generated = decode_reply(reply, _VllmGenerateReply)
        if request.image_fields is not None and generated.prompt_token_ids != sent_ids(request):
            made = len(generated.prompt_token_ids or ())
            raise RequestRefused(
                f"of a sample with {len(request.images)} images it makes {made} tokens "
                f"that are not the student's {request.tokens}"
            )
        return _scores(generated.prompt_logprobs, request, top_k)


@dataclass(frozen=True)
class VllmCompletions(TeacherProtocol):
    """vLLM's `/v1/completions` with its `prompt_logprobs` field."""

    name: ClassVar[str] = "vllm-completions"
    path: ClassVar[str] = "/v1/completions"

    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """As in the base class. One token is generated, since vLLM takes no less."""
        return {
            "model": model,
            "prompt": sent_ids(request),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": top_k,
        }

    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """As in the base class."""
        return _scores(_first_choice(reply).prompt_logprobs, request, top_k)

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """As in the base class."""
        positions = (_first_choice(reply).prompt_logprobs or [])[len(request.prompt_ids) :]
        texts = {}
        for token, position in zip(request.completion_ids.tolist(), positions, strict=False):
            entry = (position or {}).get(token)
            if entry is not None and entry.decoded_token is not None:
                texts[token] = entry.decoded_token
        return texts


def _first_choice(reply: bytes) -> _VllmCompletionsChoice:
    choices = decode_reply(reply, _VllmCompletionsReply).choices
    if not choices:
        raise BadReply("a reply without choices")
    return choices[0]


def _scores(positions: _PromptLogprobs | None, request: ScoreRequest, top_k: int) -> Scores:
    """The scores in a `prompt_logprobs` list: one dict a token, None for the first token."""
    if positions is None:
        raise BadReply("a reply without prompt_logprobs")
    if len(positions) != request.tokens:
        raise BadReply(f"logprobs of {len(positions)} tokens for a prompt of {request.tokens}")
    logprobs = [
        {token: entry.logprob for token, entry in (position or {}).items()}
        for position in positions[len(request.prompt_ids) :]
    ]
    pairs = []
    for token, position in zip(request.completion_ids.tolist(), logprobs, strict=True):
        # Where the sampled token is missing, any other one of the position shows in the message.
        listed = token if token in position else next(iter(position), None)
        pairs.append((listed, position.get(token)))
    return with_likeliest(scores_of_pairs(pairs, request), logprobs, top_k)
