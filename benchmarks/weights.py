"""What an update of a bfloat16 policy takes: the share of its weights that a step changes, and a
delta beside the full set.

    OMP_NUM_THREADS=1 python -m benchmarks.weights [--steps 20] [--parameters 50] [--example
    reverse-text]

The first table trains the example for real at each learning rate (AdamW, no warm-up, constant,
after `WARM` steps that are not counted), and compares each published version with the one before.
The second sends a larger policy of random weights through both transports, the same share of which
changed: the CPU seconds that the trainer spends, and a generator, until the weights are checked and
in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.controls import WIDTH, Loop
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import (
    DirectoryReader,
    DirectoryWriter,
    LoadedPolicy,
    PolicyFetcher,
    PolicySender,
    StoreReader,
    StoreWriter,
    announced,
)
from onstream.pipeline.weights.delta import encode
from onstream.pipeline.weights.redis_store import ChunkReader, ChunkWriter
from onstream.settings.load import load_settings
from onstream.workers.launcher.embedded_redis import EmbeddedRedis

RATES = (1e-6, 1e-5, 1e-4)
WARM = 5
UPDATES = 5
_MB = 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--parameters", type=float, default=50, help="millions, of the larger policy"
    )
    parser.add_argument("--example", default="reverse-text", help="a directory of examples/")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "learning rate",
        "weights changed a step",
        "full set, bytes",
        "delta, bytes",
        "delta / full",
        "steps sent whole",
    )
    shares = {rate: trained(asked.example, rate, asked.steps, table) for rate in RATES}
    Console(width=WIDTH).print(table)
    table = Table(
        "weights changed",
        "transport",
        "MB a full set",
        "MB a delta",
        "trainer: full",
        "trainer: delta",
        "generator: full",
        "generator: delta",
    )
    for share in shares.values():
        for transport in ("filesystem", "redis"):
            table.add_row(
                f"{share:.1%}",
                transport,
                *transported(transport, share, int(asked.parameters * 1e6)),
            )
    Console(width=WIDTH).print(table)


def trained(example: str, rate: float, steps: int, table: Table) -> float:
    """Train `example` at `rate`; returns the mean share of weights that a step changed."""
    given = [
        "trainer.dtype=bfloat16",
        f"trainer.optim.lr={rate}",
        "trainer.optim.warmup=0",
        "trainer.optim.schedule=constant",
    ]
    loop = Loop("teacher", load_settings([Path("examples") / example / "onstream.toml"], given))
    shares = []
    sizes = []
    full = 0
    before = LoadedPolicy.of(0, loop.learner.published_state())
    for number in range(WARM + steps):
        loop.step(number)
        after = LoadedPolicy.of(number + 1, loop.learner.published_state())
        delta = encode(before, after)
        assert delta is not None
        before = after
        full = after.data.size
        if number >= WARM:
            shares.append(delta.share)
            sizes.append(delta.data.size if delta.data is not None else full)
    mean = fmean(sizes)
    whole = sum(size == full for size in sizes)
    table.add_row(
        f"{rate:g}",
        f"{fmean(shares):.2%}",
        f"{full:,}",
        f"{mean:,.0f}",
        f"{mean / full:.3f}",
        f"{whole} of {steps}",
    )
    return fmean(shares)


def versions(parameters: int, share: float) -> Iterator[LoadedPolicy]:
    """A bfloat16 policy of `parameters` random weights in tensors of 4 million, and its successors,
    each `share` of the weights later.
    """
    draw = torch.Generator().manual_seed(0)
    size = min(parameters, 4_000_000)
    state = {
        f"w{index}": torch.randn(size, generator=draw).to(torch.bfloat16)
        for index in range(max(1, parameters // size))
    }
    for number in range(UPDATES + 1):
        yield LoadedPolicy.of(number, state)
        for tensor in state.values():
            tensor.view(torch.int16)[torch.rand(size, generator=draw) < share] ^= 1


def transported(transport: str, share: float, parameters: int) -> list[str]:
    """Cells: the megabytes of a full set and of a delta, then median CPU seconds of the trainer,
    and of a generator, for each.
    """
    found = {
        deltas: sent_and_fetched(transport, share, parameters, deltas) for deltas in (False, True)
    }
    cells = [f"{found[deltas][0] / _MB:.1f}" for deltas in (False, True)]
    return cells + [
        f"{found[deltas][column]:.3f} s" for column in (1, 2) for deltas in (False, True)
    ]


def sent_and_fetched(
    transport: str, share: float, parameters: int, deltas: bool
) -> tuple[float, float, float]:
    """Bytes of an update, and the median CPU seconds that it takes the trainer and a generator."""
    took: list[tuple[float, float, float]] = []
    with opened(transport, parameters) as (writer, store_reader):
        sender = PolicySender(writer, 10**6 if deltas else None)
        reader = PolicyFetcher(store_reader, deltas=deltas)
        for policy in versions(parameters, share):
            sending = seconds(partial(sender.send, policy))
            fetching = seconds(partial(reader.fetch, announced(policy)))
            took.append((reader.fetched_bytes, sending, fetching))
    size, sending, fetching = (median(column) for column in zip(*took[1:], strict=True))
    return size, sending, fetching


@contextlib.contextmanager
def opened(transport: str, parameters: int) -> Iterator[tuple[StoreWriter, StoreReader]]:
    """Both ends of a transport that holds nothing yet."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "model").mkdir()
        if transport == "filesystem":
            yield DirectoryWriter(directory, directory / "model"), DirectoryReader(directory)
            return
        server = EmbeddedRedis(directory / "redis", max_memory_mb=16 * parameters // 1_000_000 + 64)
        bus = Bus.connect(
            server.start(), "benchmark", consumer="benchmark", block_s=1, connect_timeout_s=10
        )
        yield ChunkWriter(bus.weights, bus.lease.acquire(600), 0.9, 10), ChunkReader(bus.weights)
        bus.close()
        server.stop()


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process that `work` takes: a busy machine disturbs them less. Those of
    Redis are not in them.
    """
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
