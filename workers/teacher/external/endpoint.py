"""One server that scores, and how it is asked for scores."""

from __future__ import annotations

import httpx

from onstream.pipeline.http import Endpoint, RequestRefused
from onstream.workers.teacher.external.protocols import TeacherProtocol
from onstream.workers.teacher.external.protocols.vllm import VllmGenerate
from onstream.workers.teacher.scorer import ScoreRequest, Scores

IMAGE_PROTOCOL = VllmGenerate.name
"""The protocol that can send images, for messages."""


class TeacherEndpoint(Endpoint):
    """A server that scores.

    The check at the start fills in `protocol`, and `context_tokens` where the server says them.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        super().__init__(base_url, http, timeout_s)
        self.protocol: TeacherProtocol | None = None
        self.context_tokens: int | None = None

    async def score(self, request: ScoreRequest, model: str, top_k: int) -> Scores:
        """The scores of `request`.

        Raises:
            EndpointFault: the server failed, and the request is not the cause.
            RequestRefused: the request is too long, the server refuses it, or it would be scored
                without its images.
        """
        assert self.protocol is not None, "an endpoint that serves has been checked"
        if request.images and (request.image_fields is None or not self.protocol.carries_images):
            raise RequestRefused(
                f"it would be scored without its images: {self.protocol.name} sends token ids "
                f"alone, and {IMAGE_PROTOCOL} images too"
            )
        if self.context_tokens is not None and request.tokens + 1 > self.context_tokens:
            raise RequestRefused(
                f"{request.tokens} tokens, and one that scoring takes, "
                f"exceed its context of {self.context_tokens}"
            )
        reply = await self.post(self.protocol.path, self.protocol.body(model, request, top_k))
        return self.protocol.scores(reply, request, top_k)
