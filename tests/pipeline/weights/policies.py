"""Policies that change a little from one version to the next, and both transports to send them
through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import (
    DirectoryReader,
    DirectoryWriter,
    LoadedPolicy,
    PolicyFetcher,
    PolicySender,
    StoreReader,
    StoreWriter,
)
from onstream.pipeline.weights.redis_store import ChunkReader, ChunkWriter


def course(
    versions: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, rate: float = 1e-4
) -> Iterator[LoadedPolicy]:
    """`versions` policies, from number 0 on: float32 master weights that move by about `rate`, cast
    to `dtype`.
    """
    draw = torch.Generator().manual_seed(seed)
    master = {
        name: torch.randn(shape, generator=draw)
        for name, shape in (("embed", (300, 64)), ("w", (64, 192)), ("norm", (64,)))
    }
    steps = torch.zeros(1, dtype=torch.int64)
    for number in range(versions):
        yield LoadedPolicy.of(
            number,
            {
                **{name: weight.to(dtype) for name, weight in master.items()},
                "steps": steps + number,
            },
        )
        for weight in master.values():
            weight += rate * torch.randn(weight.shape, generator=draw)


@dataclass
class Transport:
    """Both ends of one transport."""

    name: str
    run_dir: Path
    bus: Bus

    def outlet(self) -> StoreWriter:
        if self.name == "redis":
            return ChunkWriter(self.bus.weights, self.bus.lease.acquire(5), share=0.5, patience_s=1)
        (self.run_dir / "model").mkdir(exist_ok=True)
        return DirectoryWriter(self.run_dir, self.run_dir / "model")

    def store_reader(self) -> StoreReader:
        return (
            ChunkReader(self.bus.weights) if self.name == "redis" else DirectoryReader(self.run_dir)
        )

    def sender(self, full_every: int | None = 10) -> PolicySender:
        return PolicySender(self.outlet(), full_every)

    def reader(self) -> PolicyFetcher:
        return PolicyFetcher(self.store_reader(), deltas=True)
