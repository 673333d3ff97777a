"""Weights in Redis, as chunks of a hash for each part, and an index of the parts that are whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.trainer_lease import Authority, Lease


@dataclass(frozen=True)
class Memory:
    """Bytes that a Redis uses, and may use; no bound where `most_bytes` is 0."""

    used_bytes: int
    most_bytes: int


class WeightShelf(Authority):
    """What `weights.transport = "redis"` asks of Redis. Only the trainer writes; chunks are written
    one to a call, so that none is slow.
    """

    def memory(self) -> Memory:
        """How full the server is."""
        info = self._patiently(lambda: self._db.info("memory"))
        return Memory(int(info["used_memory"]), int(info["maxmemory"]))

    def weights(self) -> dict[str, bytes]:
        """The parts that are whole, as the trainer described them, by place."""
        return {
            place.decode(): part for place, part in self._ask("HGETALL", self.keys.weights).items()
        }

    def weight_chunk(self, place: str, index: int) -> bytes | None:
        """One chunk of what lies at `place`; None where it is gone."""
        chunk: bytes | None = self._ask("HGET", self.keys.weight_chunks(place), index)
        return chunk

    def chunks_kept(self, place: str) -> int:
        """How many chunks lie at `place`."""
        return int(self._ask("HLEN", self.keys.weight_chunks(place)))

    def keep_chunk(self, lease: Lease, place: str, index: int, chunk: memoryview) -> None:
        """Write one chunk. Nobody looks for it before `offer_weights`.

        Raises:
            LeaseLost: another trainer took over.
            redis.OutOfMemoryError: Redis is full.
        """
        self._fenced(
            scripts.KEEP_CHUNK,
            lease,
            [self.keys.weight_places, self.keys.weight_chunks(place)],
            [place, index, chunk],
        )

    def offer_weights(self, lease: Lease, parts: Mapping[str, bytes]) -> None:
        """Make `parts`, by place, all that there is, and delete the chunks of any other place.

        Raises:
            LeaseLost: another trainer took over.
        """
        written = {place.decode() for place in self._ask("SMEMBERS", self.keys.weight_places)}
        gone = sorted(written - set(parts))
        keys = [self.keys.weights, self.keys.weight_places, *map(self.keys.weight_chunks, gone)]
        self._fenced(
            scripts.OFFER_WEIGHTS,
            lease,
            keys,
            [len(gone), *gone, *(value for pair in parts.items() for value in pair)],
        )
