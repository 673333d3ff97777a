"""Samples with images, to endpoints: never scored without them, nor by what was said of other
pictures.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import numpy as np
import pytest

from onstream.pipeline.http import RequestRefused
from onstream.pipeline.redis.bus import Bus
from onstream.workers.teacher.external.endpoint import TeacherEndpoint
from onstream.workers.teacher.external.protocols import TeacherProtocol, load_variants
from onstream.workers.teacher.external.protocols.vllm import VllmGenerate
from onstream.workers.teacher.external.score_cache import ScoreCache
from onstream.workers.teacher.scorer import ScoreRequest, Scores

SENT = {
    "token_ids": [2, 9, 50, 60],
    "content_parts": [{"type": "image_url", "url": "data:image/png;base64,", "uuid": "a"}],
}
SHOWS = ScoreRequest(
    np.array([2, 9, 9], dtype=np.int32), np.array([50, 60], dtype=np.int32), ("a",), SENT
)


def test_the_same_tokens_of_another_picture_were_not_scored_before(bus: Bus) -> None:
    cache = ScoreCache(
        bus.scores,
        10,
        teacher="teacher",
        check_request=SHOWS,
        reference=np.zeros(2, dtype=np.float32),
    )
    cache.keep([(SHOWS, Scores(np.array([-1.0, -2.0], dtype=np.float32)))])
    found = cache.find(
        [
            SHOWS,
            replace(SHOWS, images=("b",)),
            replace(SHOWS, images=("a", "a")),
            replace(SHOWS, images=()),
        ],
        top_k=0,
    )
    assert [scores is not None for scores in found] == [True, False, False, False]


def test_the_pictures_are_sent_in_the_place_of_their_tokens() -> None:
    body = VllmGenerate().body("teacher", SHOWS, 4)
    assert (body["token_ids"], body["content_parts"]) == (SENT["token_ids"], SENT["content_parts"])


def test_a_server_that_makes_other_tokens_of_an_image_is_not_believed() -> None:
    positions = [None, *({str(token): {"logprob": -1.0}} for token in (9, 9, 50, 60))]
    for made in ([2, 9, 50, 60], None):
        reply = json.dumps({"prompt_token_ids": made, "prompt_logprobs": positions}).encode()
        with pytest.raises(RequestRefused, match="of a sample with 1 images it makes"):
            VllmGenerate().scores(reply, SHOWS, 0)


@pytest.mark.parametrize("protocol", load_variants("auto"), ids=str)
def test_nothing_is_asked_of_a_sample_that_would_be_scored_without_its_images(
    protocol: TeacherProtocol,
) -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise AssertionError("it was asked")

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(unreachable)) as http:
            endpoint = TeacherEndpoint("http://teacher/v1", http, 1.0)
            endpoint.protocol = protocol
            await endpoint.score(
                replace(SHOWS, image_fields=None) if protocol == VllmGenerate() else SHOWS,
                "teacher",
            )

    with pytest.raises(RequestRefused, match="it would be scored without its images"):
        asyncio.run(ask())
