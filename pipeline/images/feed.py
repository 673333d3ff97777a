"""The images that records name, fetched and processed ahead of their use by a thread of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from pipeline.images.reading import Picture
from pipeline.records import Ids

if TYPE_CHECKING:
    from pipeline.models.vision import ImageFeatures, Vision


class MissingImage(LookupError):
    """An image that a record names, and nobody has any more."""


class ImageFeed:
    """What `vision` makes of images by digest, each processed once while it is kept.

    Args:
        vision: called by this feed's thread alone.
        fetch: gives the bytes of an image, or None; called by that thread too.
        keep_bytes: memory of the tensors that are kept; the least recently used go first.
    """

    def __init__(self, vision: Vision, fetch: Callable[[str], bytes | None], keep_bytes: int) -> None:
        self._vision, self._fetch, self._keep_bytes = vision, fetch, keep_bytes
        self._made: OrderedDict[str, Future[ImageFeatures]] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")

    def ahead(self, digests: Iterable[str]) -> None:
        """Begin with what of `digests` is not there yet."""
        for digest in digests:
            self._future(digest)

    def of(self, digests: Iterable[str]) -> dict[str, ImageFeatures]:
        """What became of `digests`. Waits for those that are under way.

        Raises:
            MissingImage: the bytes of one are gone.
        """
        futures = {digest: self._future(digest) for digest in digests}
        made = {}
        for digest, future in futures.items():
            try:
                made[digest] = future.result()
            except MissingImage:
                self._made.pop(digest, None)  # it may come back with another rollout
                raise
        self._forget()
        return made

    def objection(self, prompt_ids: Ids, digests: Sequence[str]) -> str | None:
        """Why a prompt cannot be read with the images that it shows, in words; None where all are there and their tokens in it."""
        try:
            made = self.of(digests)
        except MissingImage as error:
            return str(error)
        return self._vision.misplaced(prompt_ids, [made[digest] for digest in digests])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _future(self, digest: str) -> Future[ImageFeatures]:
        if digest not in self._made:
            self._made[digest] = self._thread.submit(self._make, digest)
        self._made.move_to_end(digest)
        return self._made[digest]

    def _make(self, digest: str) -> ImageFeatures:
        data = self._fetch(digest)
        if data is None:
            raise MissingImage(f"the image {digest[:12]} is gone")
        return self._vision.features(Picture(data))

    def _forget(self) -> None:
        sizes = {digest: made.result().size_bytes for digest, made in self._made.items() if made.done() and not made.exception()}
        total = sum(sizes.values())
        for digest, size in sizes.items():
            if total <= self._keep_bytes:
                return
            del self._made[digest]
            total -= size
