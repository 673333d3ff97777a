"""Weights in Redis: a hash of chunks for each part, and an index of the parts that are whole."""

from __future__ import annotations

from collections.abc import Mapping

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.trainer_lease import TrainerLease


class WeightStore:
    """What `weights.transport = "redis"` asks of Redis.

    Only the trainer writes. Each call writes one chunk, so that no call is slow.
    """

    def __init__(self, connection: Connection, lease: TrainerLease) -> None:
        self._connection = connection
        self._keys = connection.keys
        self._lease = lease

    def max_memory_bytes(self) -> int:
        """The bytes that Redis may use; 0 if it has no limit."""
        info = self._connection.patiently(lambda: self._connection.client.info("memory"))
        return int(info["maxmemory"])

    def parts(self) -> dict[str, bytes]:
        """The parts that are whole, as the trainer described them, by place."""
        return {
            place.decode(): part
            for place, part in self._connection.ask("HGETALL", self._keys.weights).items()
        }

    def read_chunk(self, place: str, index: int) -> bytes | None:
        """One chunk of what lies at `place`; None where it is gone."""
        chunk: bytes | None = self._connection.ask("HGET", self._keys.weight_chunks(place), index)
        return chunk

    def count_chunks(self, place: str) -> int:
        """How many chunks lie at `place`."""
        return int(self._connection.ask("HLEN", self._keys.weight_chunks(place)))

    def write_chunk(self, lease: Lease, place: str, index: int, chunk: memoryview) -> None:
        """Write one chunk. No reader looks for it before `offer`.

        Raises:
            LeaseLost: another trainer took over.
            redis.OutOfMemoryError: Redis is full.
        """
        self._lease.fenced(
            scripts.WRITE_CHUNK,
            lease,
            [self._keys.weight_places, self._keys.weight_chunks(place)],
            [place, index, chunk],
        )

    def offer(self, lease: Lease, parts: Mapping[str, bytes]) -> None:
        """Make `parts`, by place, all that there is, and delete the chunks of any other place.

        Raises:
            LeaseLost: another trainer took over.
        """
        written = {
            place.decode() for place in self._connection.ask("SMEMBERS", self._keys.weight_places)
        }
        gone = sorted(written - set(parts))
        keys = [self._keys.weights, self._keys.weight_places, *map(self._keys.weight_chunks, gone)]
        self._lease.fenced(
            scripts.OFFER_WEIGHTS,
            lease,
            keys,
            [len(gone), *gone, *(value for pair in parts.items() for value in pair)],
        )
