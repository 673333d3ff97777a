"""Images in Redis: the bytes of each once, as long as a rollout that names it is not settled.

A number holds its images. The script that counts it as a holder looks whether its entry is still in
somebody's hands; the script that acknowledges its entry at the trainer lets its images go. So a
worker that dies, or comes late, neither loses an image nor leaves one behind.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from redis.exceptions import OutOfMemoryError

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection, batched
from onstream.pipeline.redis.keys import GROUP
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.trainer_lease import TrainerLease
from onstream.settings.stages import StreamName

NUMBERS_AT_ONCE = 500
HELD_AT_ONCE = 64
BYTES_AT_ONCE = 1 << 20  # one script stalls every client of the server while it runs
FULL_RETRY_S = 0.2


Reply = int | list[bytes]  # held or not, or the digests whose bytes are needed first


class ImagesFull(Exception):
    """Redis has had no memory for an image for as long as the worker may wait."""


@dataclass(frozen=True)
class ImageHold:
    """The images that `number` needs, bytes by digest; `entry_id` is its pending entry."""

    entry_id: bytes
    number: int
    images: Mapping[str, bytes]


class ImageStore:
    """The images of one run."""

    def __init__(self, connection: Connection, lease: TrainerLease) -> None:
        self._connection = connection
        self._keys = connection.keys
        self._lease = lease

    def hold(
        self, stage: StreamName, holds: Sequence[ImageHold], *, patience_s: float
    ) -> list[bool]:
        """Keep the images of `holds` until their numbers are settled.

        Returns, for each, whether it holds; False where somebody else has finished its entry of
        `stage`. Bytes are sent only where Redis does not have them. While Redis is full, this waits
        for others to free memory.

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
        stage: StreamName,
        holds: Sequence[ImageHold],
        brought: Mapping[str, bytes],
        patience_s: float,
    ) -> list[Reply]:
        keys = [
            self._keys.streams[stage],
            self._keys.images_held,
            self._keys.images_counted,
            self._keys.images,
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
                replies: list[Reply] = self._connection.run_script(scripts.HOLD_IMAGES, keys, args)
                return replies
            except OutOfMemoryError as error:
                if time.monotonic() > deadline:
                    numbers = ", ".join(str(hold.number) for hold in holds)
                    raise ImagesFull(
                        f"redis is full, and had no room for the images of {numbers} for "
                        f"{patience_s:.0f} s"
                    ) from error
                time.sleep(FULL_RETRY_S)

    def read(self, digests: Sequence[str]) -> list[bytes | None]:
        """The bytes of images by their digests; None for one that no number holds."""
        found: list[bytes | None] = self._connection.ask("HMGET", self._keys.images, *digests)
        return found

    def count(self) -> tuple[int, int]:
        """How many images Redis keeps, and their bytes."""
        count, size = self._connection.run_script(scripts.COUNT_IMAGES, [self._keys.images], [])
        return int(count), int(size)

    def holding_numbers(self) -> list[int]:
        """The numbers that hold images."""
        return [int(number) for number in self._connection.ask("HKEYS", self._keys.images_held)]

    def release(self, lease: Lease, numbers: Collection[int]) -> None:
        """Let go of the images of `numbers`, which were settled without an entry to acknowledge.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self._keys.images_held, self._keys.images_counted, self._keys.images]
        for some in batched(list(numbers), NUMBERS_AT_ONCE):
            self._lease.fenced(scripts.RELEASE_IMAGES, lease, keys, some)


def _some_bytes(missing: Iterable[tuple[ImageHold, Sequence[str]]]) -> dict[str, bytes]:
    """Images to send with one call: those of the first number, and more up to `BYTES_AT_ONCE`."""
    some: dict[str, bytes] = {}
    for hold, digests in missing:
        more = {digest: hold.images[digest] for digest in digests}
        if some and sum(map(len, (some | more).values())) > BYTES_AT_ONCE:
            break
        some |= more
    return some
