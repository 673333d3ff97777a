"""Images in Redis: the bytes of each once, for as long as a rollout that names it has not settled.

What needs an image is a number. It is counted once, in a script that looks whether its entry is
still in somebody's hands, and let go by the script that acknowledges its entry at the trainer; so a
worker that dies, or comes late, neither loses an image nor leaves one behind.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from redis.exceptions import OutOfMemoryError

from onstream.pipeline.records import StageName
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.keys import GROUP
from onstream.pipeline.redis.trainer_lease import Authority, Lease

NUMBERS_AT_ONCE = 500
HELD_AT_ONCE = 64
BYTES_AT_ONCE = 1 << 20  # one script stalls every client of the server while it runs
FULL_RETRY_S = 0.2


Reply = int | list[bytes]  # held or not, or the digests whose bytes are needed first


class ImagesFull(Exception):
    """Redis has had no memory for an image for as long as the worker may wait."""


@dataclass(frozen=True)
class Hold:
    """The images that `number` needs, bytes by digest; `entry_id` is the entry that it is in
    somebody's hands with.
    """

    entry_id: bytes
    number: int
    images: Mapping[str, bytes]


class ImageShelf(Authority):
    """The images of one run."""

    def hold_images(
        self, stage: StageName, holds: Sequence[Hold], *, patience_s: float
    ) -> list[bool]:
        """Keep the images of `holds` until their numbers have settled; False for those whose entry
        of `stage` somebody else has finished.

        Bytes are sent only where Redis has not got them. While Redis is full, waits for others to
        free memory.

        Raises:
            ImagesFull: it stayed full for `patience_s` seconds.
        """
        held: dict[bytes, bool] = {}
        wanted = list(holds)
        brought = dict[str, bytes]()
        while wanted:
            some = wanted[:HELD_AT_ONCE]
            wanted = wanted[HELD_AT_ONCE:]
            missing = []
            for hold, reply in zip(some, self._hold(stage, some, brought, patience_s), strict=True):
                if isinstance(reply, int):
                    held[hold.entry_id] = bool(reply)
                else:
                    missing.append((hold, [digest.decode() for digest in reply]))
            wanted = [hold for hold, _ in missing] + wanted
            brought = _some_bytes(missing)
        return [held[hold.entry_id] for hold in holds]

    def _hold(
        self,
        stage: StageName,
        holds: Sequence[Hold],
        brought: Mapping[str, bytes],
        patience_s: float,
    ) -> list[Reply]:
        keys = [
            self.keys.stream(stage),
            self.keys.images_held,
            self.keys.images_counted,
            self.keys.images,
        ]
        args: list[str | bytes | int] = [
            GROUP,
            len(brought),
            *(part for item in brought.items() for part in item),
        ]
        for hold in holds:
            args += [hold.entry_id, hold.number, len(hold.images), *hold.images]
        deadline = time.monotonic() + patience_s
        while True:
            try:
                replies: list[Reply] = self._run(scripts.HOLD_IMAGES, keys, args)
                return replies
            except OutOfMemoryError as error:
                if time.monotonic() > deadline:
                    numbers = ", ".join(str(hold.number) for hold in holds)
                    raise ImagesFull(
                        f"redis is full, and had no room for the images of {numbers} for {patience_s:.0f} s"
                    ) from error
                time.sleep(FULL_RETRY_S)

    def images(self, digests: Sequence[str]) -> list[bytes | None]:
        """The bytes of images; None for one that nobody holds."""
        found: list[bytes | None] = self._ask("HMGET", self.keys.images, *digests)
        return found

    def images_held(self) -> tuple[int, int]:
        """How many images Redis keeps, and their bytes."""
        count, size = self._run(scripts.COUNT_IMAGES, [self.keys.images], [])
        return int(count), int(size)

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


def _some_bytes(missing: Iterable[tuple[Hold, Sequence[str]]]) -> dict[str, bytes]:
    """Images to send with one call: all that the first number misses, and of others what
    `BYTES_AT_ONCE` has room for.
    """
    some: dict[str, bytes] = {}
    for hold, digests in missing:
        more = {digest: hold.images[digest] for digest in digests}
        if some and sum(map(len, (some | more).values())) > BYTES_AT_ONCE:
            break
        some |= more
    return some
