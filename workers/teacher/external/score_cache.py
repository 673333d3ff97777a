"""A cache of the scores that an external teacher gave before for the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from onstream.pipeline.record_codec import ids_array, ids_bytes, logprobs_array, logprobs_bytes
from onstream.pipeline.records import Logprobs
from onstream.pipeline.redis.score_store import ScoreStore
from onstream.workers.teacher.external.endpoint import SAME_NATS, distance
from onstream.workers.teacher.scorer import ScoreRequest, Scores


class _CachedScores(msgspec.Struct, array_like=True):
    logprobs: bytes
    top_ids: bytes | None = None
    top_logprobs: bytes | None = None


_decoder = msgspec.msgpack.Decoder(_CachedScores)


class ScoreCache:
    """Scores by teacher, token ids, images and k. `most` entries are kept; with 0, none.

    A name says little about the weights behind it. So a teacher is identified by its name and by
    how it scores the check's text. One that scores that text otherwise than the last teacher of its
    name does not get that one's scores.

    Args:
        check_request: the check's text.
        reference: the logprobs [C] that the teacher gives it.
    """

    def __init__(
        self,
        store: ScoreStore,
        most: int,
        *,
        teacher: str,
        check_request: ScoreRequest,
        reference: Logprobs,
    ) -> None:
        self._store = store
        self._most = most
        if most:
            name = _digest(teacher.encode(), ids_bytes(check_request.completion_ids))
            noted = store.teacher_check(name)
            if noted is None or distance(logprobs_array(noted), reference) > SAME_NATS:
                noted = logprobs_bytes(reference)
                store.note_teacher_check(name, noted)
            self._teacher = _digest(name, noted)

    def find(self, requests: Sequence[ScoreRequest], top_k: int) -> list[Scores | None]:
        """The scores with the `top_k` likeliest tokens that `requests` got before, each or None."""
        if not self._most:
            return [None] * len(requests)
        kept = self._store.recall([self._key(request, top_k) for request in requests])
        return [None if value is None else _scores(value, top_k) for value in kept]

    def keep(self, scored: Sequence[tuple[ScoreRequest, Scores]]) -> None:
        """Keep scores for later."""
        if self._most:
            self._store.keep(
                [
                    (self._key(request, _top_k(scores)), _value(scores))
                    for request, scores in scored
                ],
                self._most,
            )

    def _key(self, request: ScoreRequest, top_k: int) -> bytes:
        # The token ids of an image are the same for all images, so digests belong to the key.
        images = [digest.encode() for digest in request.images]
        split = f"{top_k} {len(request.prompt_ids)}".encode()
        return _digest(
            self._teacher,
            split,
            ids_bytes(request.prompt_ids),
            ids_bytes(request.completion_ids),
            *images,
        )


def _scores(value: bytes, top_k: int) -> Scores:
    kept = _decoder.decode(value)
    if kept.top_ids is None or kept.top_logprobs is None:
        return Scores(logprobs_array(kept.logprobs))
    shape = (-1, top_k)
    return Scores(
        logprobs_array(kept.logprobs),
        ids_array(kept.top_ids).reshape(shape),
        logprobs_array(kept.top_logprobs).reshape(shape),
    )


def _top_k(scores: Scores) -> int:
    return 0 if scores.top_ids is None else scores.top_ids.shape[1]


def _value(scores: Scores) -> bytes:
    top = None if scores.top_ids is None else ids_bytes(scores.top_ids)
    top_logprobs = None if scores.top_logprobs is None else logprobs_bytes(scores.top_logprobs)
    return msgspec.msgpack.encode(
        _CachedScores(logprobs_bytes(np.asarray(scores.logprobs)), top, top_logprobs)
    )


def _digest(*parts: bytes) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.digest()
