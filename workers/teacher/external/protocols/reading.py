"""What the protocols share: reading replies, and checking them by token id.

Whatever a server returns is looked up by token id. A position of vLLM's reply, for example, holds
the k likeliest tokens and the sampled one in no reliable order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from onstream.pipeline.http import BadReply
from onstream.settings.decoding import UNDECODABLE
from onstream.workers.teacher.scorer import ScoreRequest, Scores

Position = Mapping[int, float]  # token id -> logprob
Form = TypeVar("Form")


def sent_ids(request: ScoreRequest) -> list[int]:
    """The token ids of prompt and completion."""
    return [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]


def decode_reply(reply: bytes, form: type[Form]) -> Form:
    """`reply` as `form`.

    Raises:
        BadReply: it does not have that form.
    """
    try:
        return msgspec.json.decode(reply, type=form)
    except UNDECODABLE as error:
        raise BadReply(f"the reply does not have the protocol's form ({error})") from error


def scores_of_pairs(
    pairs: Sequence[tuple[int | None, float | None]], request: ScoreRequest
) -> Scores:
    """Scores from the token id and the logprob of each completion token.

    Raises:
        BadReply: the ids are not the completion's, or a logprob is missing or not finite.
    """
    expected = request.completion_ids.tolist()
    if len(pairs) != len(expected):
        raise BadReply(f"logprobs of {len(pairs)} tokens for a completion of {len(expected)}")
    logprobs = np.empty(len(expected), dtype=np.float32)
    for at, ((token, logprob), ours) in enumerate(zip(pairs, expected, strict=True)):
        where = f"at position {at} of the completion"
        if token != ours:
            raise BadReply(f"token {token} where token {ours} was sent, {where}")
        if logprob is None or not math.isfinite(logprob):
            raise BadReply(f"logprob {logprob} for token {ours} {where}")
        logprobs[at] = logprob
    return Scores(logprobs)


def with_likeliest(scores: Scores, positions: Sequence[Position], top_k: int) -> Scores:
    """`scores` with the k likeliest tokens of each of `positions`, likeliest first.

    The tail is the trainer's to compute.

    Raises:
        BadReply: there are fewer positions than completion tokens, or fewer than k at one.
    """
    if top_k == 0:
        return scores
    count = len(scores.logprobs)
    if len(positions) != count:
        raise BadReply(
            f"the likeliest tokens of {len(positions)} positions for a completion of {count}"
        )
    ids = np.empty((count, top_k), dtype=np.int32)
    logprobs = np.empty((count, top_k), dtype=np.float32)
    for at, position in enumerate(positions):
        likeliest = heapq.nlargest(top_k, position.items(), key=lambda item: item[1])
        if len(likeliest) < top_k:
            raise BadReply(
                f"{len(likeliest)} likeliest tokens at position {at} of the completion "
                f"where {top_k} were asked for"
            )
        ids[at], logprobs[at] = zip(*likeliest, strict=True)
    return Scores(scores.logprobs, ids, logprobs)
