"""What a teacher protocol is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from onstream.workers.teacher.scorer import ScoreRequest, Scores


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
