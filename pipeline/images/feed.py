"""The images that records name, fetched and processed ahead of their use by a thread of its own."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from onstream.pipeline.images.limits import ImageError
from onstream.pipeline.images.reading import Picture
from onstream.pipeline.records import Ids

if TYPE_CHECKING:
    from onstream.pipeline.images.vision import Vision
    from onstream.pipeline.models.image_features import ImageFeatures


Fetch = Callable[[Sequence[str]], Sequence[bytes | None]]
"""Gives the bytes of images by their digests, None for one that is gone."""
FETCHED_AT_ONCE = 8


def no_images(digests: Sequence[str]) -> Sequence[None]:
    """The `Fetch` of a place where there are none."""
    return [None] * len(digests)


class MissingImage(LookupError):
    """An image that a record names, and nobody has any more."""


class ImageFeed:
    """What `vision` makes of images by digest, each processed once while it is kept.

    Args:
        vision: called by this feed's thread alone.
        fetch: called by that thread too, for several that wait at once.
        keep_bytes: memory of the tensors that are kept; the least recently used go first.
    """

    def __init__(self, vision: Vision, fetch: Fetch, keep_bytes: int) -> None:
        self._vision = vision
        self._fetch = fetch
        self._keep_bytes = keep_bytes
        self._made: OrderedDict[str, Future[ImageFeatures]] = (
            OrderedDict()
        )  # the least recently used first
        self._asked: deque[tuple[str, Future[ImageFeatures]]] = (
            deque()
        )  # what the thread has yet to begin with
        self._finished: deque[tuple[str, int]] = (
            deque()
        )  # what the thread has made since it was last counted: digest, bytes
        self._sizes: dict[str, int] = {}
        self._kept_bytes = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")

    def ahead(self, digests: Iterable[str]) -> None:
        """Begin with what of `digests` is not there yet."""
        for digest in digests:
            self._future(digest)

    def of(self, digests: Iterable[str]) -> dict[str, ImageFeatures]:
        """What became of `digests`. Waits for those that are under way.

        Raises:
            MissingImage: the bytes of one are gone.
            ImageError: the model's processor does not take one.
        """
        futures = {digest: self._future(digest) for digest in digests}
        made = {}
        for digest, future in futures.items():
            try:
                made[digest] = future.result()
            except Exception:
                self._made.pop(digest, None)  # it may come back with another rollout
                raise
        self._forget()
        return made

    def objection(self, prompt_ids: Ids, completion_ids: Ids, digests: Sequence[str]) -> str | None:
        """Why a sample cannot be read with the images that its prompt shows, in words; None where
        all are there and their tokens in it.

        A completion's last token is only ever predicted, never read: it may stand for an image that
        is not there.
        """
        try:
            made = self.of(digests)
        except (MissingImage, ImageError) as error:
            return str(error)
        return self._vision.misplaced(
            np.concatenate((prompt_ids, completion_ids[:-1])), [made[digest] for digest in digests]
        )

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _future(self, digest: str) -> Future[ImageFeatures]:
        if digest not in self._made:
            self._made[digest] = Future()
            self._asked.append((digest, self._made[digest]))
            self._thread.submit(self._begin)
        self._made.move_to_end(digest)
        return self._made[digest]

    def _begin(self) -> None:
        """Fetch some of what is asked for, together, and process each. Finds nothing to do where
        the call before has seen to it.
        """
        asked = [self._asked.popleft() for _ in range(min(FETCHED_AT_ONCE, len(self._asked)))]
        try:
            found = self._fetch([digest for digest, _ in asked]) if asked else ()
        except Exception as error:
            for _, future in asked:
                future.set_exception(error)
            return
        for (digest, future), data in zip(asked, found, strict=True):
            try:
                future.set_result(self._make(digest, data))
            except Exception as error:
                future.set_exception(error)

    def _make(self, digest: str, data: bytes | None) -> ImageFeatures:
        if data is None:
            raise MissingImage(f"the image {digest[:12]} is gone")
        features = self._vision.features(Picture(data))
        self._finished.append((digest, features.size_bytes))
        return features

    def _forget(self) -> None:
        """Let go of the least recently used beyond `keep_bytes`, without a look at the others: a
        run brings images without end.
        """
        while self._finished:
            digest, size = self._finished.popleft()
            self._sizes[digest] = size
            self._kept_bytes += size
        while self._kept_bytes > self._keep_bytes:
            oldest = next(digest for digest in self._made if digest in self._sizes)
            del self._made[oldest]
            self._kept_bytes -= self._sizes.pop(oldest)
