"""One server that scores, and how it is asked for scores."""

from __future__ import annotations

import httpx

from onstream.pipeline.http import Endpoint, RequestRefused
from onstream.workers.teacher.external.protocols import SHOWN_IMAGES, TeacherProtocol
from onstream.workers.teacher.scorer import ScoreRequest, Scores


class TeacherEndpoint(Endpoint):
    """The probe fills in `protocol`, and `context_tokens` where the server says them."""

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        super().__init__(base_url, http, timeout_s)
        self.protocol: TeacherProtocol | None = None
        self.context_tokens: int | None = None

    async def score(self, request: ScoreRequest, model: str, top_k: int) -> Scores:
        """The scores of `request`.

        Raises:
            EndpointFault: there are none, through no fault of the request.
            RequestRefused: the request is too long, the server will not have it, or it would be scored
                without its images.
        """
        assert self.protocol is not None, "an endpoint that serves has been probed"
        if request.images and (request.sent is None or self.protocol.name != SHOWN_IMAGES):
            raise RequestRefused(
                f"it would be scored blind: {self.protocol.name} sends token ids alone, and {SHOWN_IMAGES} images too"
            )
        if self.context_tokens is not None and request.tokens + 1 > self.context_tokens:
            raise RequestRefused(
                f"{request.tokens} tokens, and one that scoring takes, exceed its context of {self.context_tokens}"
            )
        reply = await self.post(self.protocol.path, self.protocol.body(model, request, top_k))
        return self.protocol.scores(reply, request, top_k)
