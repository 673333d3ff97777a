"""What a teacher protocol is, and what the protocols share: reading replies by token id.

Whatever a server returns is looked up by token id. A position of vLLM's reply, for example, holds
the k likeliest tokens and the sampled one in no reliable order.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import msgspec
import numpy as np

from onstream.pipeline.http import BadReply
from onstream.pipeline.record_codec import LEAST_LOGPROB, is_logprob
from onstream.settings.decoding import UNDECODABLE
from onstream.workers.teacher.scorer import ScoreRequest, Scores

MOST_ID = (1 << 31) - 1
EXPECTED_LOGPROB = f"expected {LEAST_LOGPROB:g} to 0, in nats"

Position = Mapping[int, float]  # token id -> logprob
Form = TypeVar("Form")


class TeacherProtocol(ABC):
    """How a server is asked for the logprobs of a completion, and how its reply is read.

    Pure functions of the request and of the reply's bytes. `name` is its name in
    `onstream.settings.teacher_protocols`, and `path` is where requests go, from the server's root.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    carries_images: ClassVar[bool] = False
    """Whether a request can hold the images that a prompt shows."""

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """The forms of the protocol that an endpoint is tried with, in order.

        One, unless servers differ in details.
        """
        return (cls(),)

    @property
    def with_texts(self) -> TeacherProtocol | None:
        """The variant that gives the tokens' texts, where this one gives none and another does."""
        return None

    @abstractmethod
    def body(self, model: str, request: ScoreRequest, top_k: int) -> dict[str, Any]:
        """The JSON to send.

        It asks for the `top_k` likeliest tokens of each position beside the sampled one.
        """

    @abstractmethod
    def scores(self, reply: bytes, request: ScoreRequest, top_k: int) -> Scores:
        """The completion's scores: logprobs [C] in nats, and the k likeliest tokens [C, k].

        Raises:
            BadReply: the reply is not what was asked for.
        """

    def texts(self, reply: bytes, request: ScoreRequest) -> dict[int, str]:
        """The completion's token ids with their texts, as far as the server gives them.

        Raises:
            BadReply: the reply is not what was asked for.
        """
        return {}


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
        BadReply: the ids are not the completion's, or a logprob is missing or can be none.
    """
    expected = request.completion_ids.tolist()
    if len(pairs) != len(expected):
        raise BadReply(f"logprobs of {len(pairs)} tokens for a completion of {len(expected)}")
    logprobs = np.empty(len(expected), dtype=np.float32)
    for at, ((token, logprob), ours) in enumerate(zip(pairs, expected, strict=True)):
        where = f"at position {at} of the completion"
        if token != ours:
            raise BadReply(f"token {token} where token {ours} was sent, {where}")
        if logprob is None or not is_logprob(logprob):
            raise BadReply(f"logprob {logprob} for token {ours} {where}; {EXPECTED_LOGPROB}")
        logprobs[at] = logprob
    return Scores(logprobs)


def with_likeliest(scores: Scores, positions: Sequence[Position], top_k: int) -> Scores:
    """`scores` with the k likeliest tokens of each of `positions`, likeliest first.

    The tail is the trainer's to compute.

    Raises:
        BadReply: there are fewer positions than completion tokens, or fewer than k at one, or one
            that is no token id, or a logprob that can be none.
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
        tokens, logprobs[at] = zip(*likeliest, strict=True)
        if min(tokens) < 0 or max(tokens) > MOST_ID:
            raise BadReply(
                f"the likely tokens {min(tokens)} to {max(tokens)} at position {at} of the "
                f"completion; expected ids from 0 to {MOST_ID}"
            )
        most = float(logprobs[at, 0])
        least = float(logprobs[at, -1])
        if not (is_logprob(most) and is_logprob(least)):
            raise BadReply(
                f"likely tokens with logprobs {least:g} to {most:g} at position {at} of the "
                f"completion; {EXPECTED_LOGPROB}"
            )
        ids[at] = tokens
    return Scores(scores.logprobs, ids, logprobs)
