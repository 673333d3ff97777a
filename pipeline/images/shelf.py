"""Images in Redis: the bytes of each once, for as long as a rollout that names it has not settled.

What needs an image is a number. It is counted once, in a script that looks whether its entry is still in somebody's hands,
and let go by the script that acknowledges its entry at the trainer; so a worker that dies, or comes late, neither loses an
image nor leaves one behind.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from redis.exceptions import OutOfMemoryError

from pipeline import scripts
from pipeline.authority import Authority, Lease
from pipeline.keys import GROUP
from pipeline.records import StageName

NUMBERS_AT_ONCE = 500
FULL_RETRY_S = 0.2


class ImagesFull(Exception):
    """Redis has had no memory for an image for as long as the worker may wait."""


class ImageShelf(Authority):
    """The images of one run."""

    def hold_images(self, stage: StageName, entry_id: bytes, number: int, images: Mapping[str, bytes], *, patience_s: float) -> bool:
        """Keep `images`, bytes by digest, until `number` has settled; False where somebody else has finished its entry of `stage` by now.

        Their bytes are sent only where Redis has not got them. While Redis is full, waits for others to free memory.

        Raises:
            ImagesFull: it stayed full for `patience_s` seconds.
        """
        keys = [self.keys.stream(stage), self.keys.images_held, self.keys.images_counted, self.keys.images]
        asked: list[str | bytes | int] = [GROUP, entry_id, number, len(images), *images]
        deadline = time.monotonic() + patience_s
        brought: Sequence[str | bytes] = ()
        while True:
            try:
                reply = self._run(scripts.HOLD_IMAGES, keys, [*asked, *brought])
            except OutOfMemoryError as error:
                if time.monotonic() > deadline:
                    raise ImagesFull(f"redis is full, and had no room for the images of {number} for {patience_s:.0f} s") from error
                time.sleep(FULL_RETRY_S)
                continue
            if reply in ([0], [1]):
                return bool(reply[0])
            brought = [part for digest in reply for part in (digest, images[digest.decode()])]

    def image(self, digest: str) -> bytes | None:
        """The bytes of an image; None where nobody holds it."""
        data: bytes | None = self._ask("HGET", self.keys.images, digest)
        return data

    def held_numbers(self) -> list[int]:
        """The numbers that hold images."""
        return [int(number) for number in self._ask("HKEYS", self.keys.images_held)]

    def release_images(self, lease: Lease, numbers: Collection[int]) -> None:
        """Let go of the images of `numbers`, which have settled without an entry to acknowledge.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self.keys.images_held, self.keys.images_counted, self.keys.images]
        for some in _batches(list(numbers), NUMBERS_AT_ONCE):
            self._fenced(scripts.RELEASE_IMAGES, lease, keys, some)


def _batches(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (numbers[at : at + size] for at in range(0, len(numbers), size))
