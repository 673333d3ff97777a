"""The transport `redis`: weights in chunks, for generators that share no disk with the trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Collection

import msgspec
import numpy as np
import structlog
from redis.exceptions import OutOfMemoryError

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.weight_store import WeightStore
from onstream.pipeline.weights.file_format import Bytes
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError
from onstream.pipeline.weights.store import WeightPart

CHUNK_BYTES = (1 << 20) - 64
"""With its header a chunk is just under 1 MiB, and Redis's allocator takes 1 MiB for it.

Reading or writing one takes Redis about 1 ms.
"""
RETRY_S = 0.1
_MIB = 1 << 20
_decoder = msgspec.msgpack.Decoder(WeightPart)
log = structlog.get_logger(__name__)


class ChunkReader:
    """A generator's end: reads parts over its own connection, a chunk at a time."""

    where = "in Redis"

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def parts(self) -> list[WeightPart]:
        """The parts that the trainer offers."""
        return [_decoder.decode(part) for part in self._store.parts().values()]

    def read(self, part: WeightPart) -> Bytes:
        """The bytes of `part`.

        Raises:
            WeightsError: the trainer has removed it meanwhile. A full set may be replaced while it
                is read; the digest would show chunks of another one.
        """
        data = np.empty(part.size_bytes, dtype=np.uint8)
        for index, start in enumerate(range(0, part.size_bytes, CHUNK_BYTES)):
            target = data[start : start + CHUNK_BYTES]
            chunk = self._store.read_chunk(part.place, index)
            if chunk is None or len(chunk) != target.size:
                raise WeightsError(
                    f"version {part.number} was removed from Redis while it was read"
                )
            target[:] = np.frombuffer(chunk, dtype=np.uint8)
        return data


class ChunkWriter(ChunkReader):
    """The trainer's end.

    Weights take at most `share` of Redis's maxmemory; the rest is for records. A new full set is
    written beside the old one where both have room, and replaces it otherwise. If records have
    filled Redis, the writer waits for up to `patience_s`.
    """

    def __init__(self, store: WeightStore, lease: Lease, share: float, patience_s: float) -> None:
        super().__init__(store)
        self._store = store
        self._lease = lease
        self._share = share
        self._patience_s = patience_s
        self.keep(self.parts())  # frees what a trainer that was killed left unfinished

    def parts(self) -> list[WeightPart]:
        """The parts that are offered and complete.

        A Redis that lost its data while chunks were written may have only the last of them.
        """
        return [part for part in super().parts() if self._is_complete(part)]

    def _is_complete(self, part: WeightPart) -> bool:
        return self._store.count_chunks(part.place) == -(-part.size_bytes // CHUNK_BYTES)

    def room_bytes(self) -> float:
        """How much more of Redis's memory weights may take."""
        return self._budget() - sum(part.size_bytes for part in self.parts())

    def _budget(self) -> float:
        return self._share * self._store.max_memory_bytes() or math.inf

    def put_whole(self, policy: LoadedPolicy) -> WeightPart:
        """Write the chunks of `policy`. Readers see it only after `keep`.

        Raises:
            UserError: Redis has no room for it.
        """
        return self._put(WeightPart.of(policy, place=""), policy.data)

    def put_delta(self, part: WeightPart, data: Bytes) -> WeightPart:
        """Write the chunks of `part`. Readers see it only after `keep`.

        Raises:
            UserError: Redis has no room for it.
        """
        return self._put(part, data)

    def _put(self, part: WeightPart, data: Bytes) -> WeightPart:
        self._make_room(part)
        kind = "full" if part.base is None else "delta"
        placed = msgspec.structs.replace(part, place=f"{part.number:06d}-{part.digest[:16]}-{kind}")
        for index, start in enumerate(range(0, data.size, CHUNK_BYTES)):
            self._write_chunk(placed, index, data[start : start + CHUNK_BYTES].data)
        return placed

    def keep(self, parts: Collection[WeightPart]) -> None:
        """Offer `parts`, and delete the chunks of all others."""
        self._store.offer(self._lease, {part.place: msgspec.msgpack.encode(part) for part in parts})

    def _make_room(self, part: WeightPart) -> None:
        budget = self._budget()
        if part.size_bytes > budget:
            raise _too_large(part, budget)
        if part.base is None and part.size_bytes > self.room_bytes():
            log.info(
                "the weights in redis are removed before the new ones are written",
                version=part.number,
                budget_mib=round(budget / _MIB),
            )
            self.keep([])

    def _write_chunk(self, part: WeightPart, index: int, chunk: memoryview) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._store.write_chunk(self._lease, part.place, index, chunk)
            except OutOfMemoryError as error:
                if time.monotonic() > deadline:
                    raise _full(part, self._patience_s) from error
                log.warning(
                    "redis is full; the weights wait",
                    version=part.number,
                    patience_s=self._patience_s,
                )
                time.sleep(RETRY_S)


def _too_large(part: WeightPart, budget: float) -> UserError:
    return UserError(
        f"policy version {part.number} has {part.size_bytes / _MIB:.0f} MiB; "
        f"weights may take {budget / _MIB:.0f} MiB of Redis's memory",
        expected="room for at least one full set of weights, and better for two",
        next_step="Raise the maxmemory of Redis (redis.max_memory for the one of `onstream up`) "
        'or weights.max_share, or set weights.transport = "filesystem".',
    )


def _full(part: WeightPart, patience_s: float) -> UserError:
    return UserError(
        f"Redis stayed full for {patience_s:g} s while policy version {part.number} was written",
        expected="memory for the records and the weights",
        next_step="Raise its maxmemory (redis.max_memory for the one of `onstream up`) or lower "
        "orchestrator.max_backlog, and start again: "
        "the run goes on from its newest checkpoint.",
        exit=Exit.FAILED,
    )
