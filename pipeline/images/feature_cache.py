"""The images that records name, fetched and processed ahead of their use in a thread of its own."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from onstream.pipeline.images.image_file import ImageError, ImageFile
from onstream.pipeline.records import Ids

if TYPE_CHECKING:
    from onstream.pipeline.images.vision import Vision
    from onstream.pipeline.models.multimodal import ImageFeatures


FetchImages = Callable[[Sequence[str]], Sequence[bytes | None]]
"""Gives the bytes of images by their digests, None for one that is gone."""
FETCHED_AT_ONCE = 8


def no_images(digests: Sequence[str]) -> Sequence[None]:
    """The `FetchImages` of a place that has no images."""
    return [None] * len(digests)


class MissingImage(LookupError):
    """A record names an image whose bytes are gone."""


class FeatureCache:
    """What `vision` makes of images, by digest. Each is processed once while it is kept.

    Args:
        vision: called by this cache's thread only.
        fetch: called by that thread too, for several images that wait at once.
        keep_bytes: memory for the tensors that are kept; the least recently used go first.
    """

    def __init__(self, vision: Vision, fetch: FetchImages, keep_bytes: int) -> None:
        self._vision = vision
        self._fetch = fetch
        self._keep_bytes = keep_bytes
        # The least recently used first.
        self._features: OrderedDict[str, Future[ImageFeatures]] = OrderedDict()
        # What the thread has yet to begin with.
        self._waiting: deque[tuple[str, Future[ImageFeatures]]] = deque()
        # What the thread has made since sizes were last counted: digest, bytes. Only deques are
        # shared with the thread: their appends and pops are atomic.
        self._finished: deque[tuple[str, int]] = deque()
        self._sizes: dict[str, int] = {}
        self._kept_bytes = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")

    def prefetch(self, digests: Iterable[str]) -> None:
        """Begin with those of `digests` that are not there yet."""
        for digest in digests:
            self._future(digest)

    def get(self, digests: Iterable[str]) -> dict[str, ImageFeatures]:
        """The features of `digests`. Waits for those that are under way.

        Raises:
            MissingImage: the bytes of one are gone.
            ImageError: the model's processor does not take one.
        """
        futures = {digest: self._future(digest) for digest in digests}
        features = {}
        for digest, future in futures.items():
            try:
                features[digest] = future.result()
            except Exception:
                self._features.pop(digest, None)  # it may come back with another rollout
                raise
        self._evict()
        return features

    def problem_with(
        self, prompt_ids: Ids, completion_ids: Ids, digests: Sequence[str]
    ) -> str | None:
        """Why a sample cannot be read with the images of its prompt, in words; None where it can.

        It can where all images are there and their tokens are in the sample. The completion's last
        token is left out: it is predicted and never read, so it may be a placeholder of an image.
        """
        try:
            features = self.get(digests)
        except (MissingImage, ImageError) as error:
            return str(error)
        read_ids = np.concatenate((prompt_ids, completion_ids[:-1]))
        return self._vision.misplaced(read_ids, [features[digest] for digest in digests])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _future(self, digest: str) -> Future[ImageFeatures]:
        if digest not in self._features:
            self._features[digest] = Future()
            self._waiting.append((digest, self._features[digest]))
            self._thread.submit(self._process_waiting)
        self._features.move_to_end(digest)
        return self._features[digest]

    def _process_waiting(self) -> None:
        """Fetch some of the waiting images together, and process each.

        One call is submitted for each image, and one call does several: later ones find nothing.
        """
        count = min(FETCHED_AT_ONCE, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(count)]
        if not batch:
            return
        try:
            found = self._fetch([digest for digest, _ in batch])
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (digest, future), data in zip(batch, found, strict=True):
            try:
                future.set_result(self._process(digest, data))
            except Exception as error:
                future.set_exception(error)

    def _process(self, digest: str, data: bytes | None) -> ImageFeatures:
        if data is None:
            raise MissingImage(f"the image {digest[:12]} is gone")
        features = self._vision.features(ImageFile(data))
        self._finished.append((digest, features.size_bytes))
        return features

    def _evict(self) -> None:
        """Drop the least recently used images beyond `keep_bytes`.

        The cost does not grow with the images that are kept: a run brings images without end.
        """
        while self._finished:
            digest, size = self._finished.popleft()
            self._sizes[digest] = size
            self._kept_bytes += size
        while self._kept_bytes > self._keep_bytes:
            oldest = next(digest for digest in self._features if digest in self._sizes)
            del self._features[oldest]
            self._kept_bytes -= self._sizes.pop(oldest)
