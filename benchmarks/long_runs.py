"""What grows with a run's rollouts: the audit, a checkpoint, a resume, and the files they rest on.

    python -m benchmarks.long_runs [--records 10000 100000 1000000]

Each row is a run of so many rollouts, settled in steps of 128 with a checkpoint every 20, by the
project's own bookkeeping over a real Redis. Every hundredth rollout was dropped as stale. Beside a
checkpoint's time, which has no model in it, stands what the same run took at its beginning.

Times are CPU seconds, so that a busy machine disturbs them less.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from logging import ERROR
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import psutil
import structlog
from rich.console import Console
from rich.table import Table

from benchmarks.trainer import peak_rss, reset_peak
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files.ledger import LEDGER, Settled
from onstream.pipeline.run_files.recording import JournalMark
from onstream.settings.sections.trainer import CheckpointSettings
from onstream.workers.inspection.audit import audit, counted
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.checkpointing import Checkpointing, TrainerPosition

RUN = "long"
BATCH = 128
INTERVAL = 20
STALE_EVERY = 100
WIDTH = 100  # characters; a file has no width of its own
LAST = 20  # checkpoints at either end that a median is of


class NoModel:
    """A learner's snapshot without weights: what is left is the bookkeeping."""

    size_bytes = 0

    def copy(self) -> None:
        """There is nothing to copy."""

    def write(self, directory: Path) -> None:
        """An empty file, without which a checkpoint is not one to go on from."""
        (directory / checkpoint.OPTIMIZER).touch()


@dataclass(frozen=True)
class LongRun:
    """What a run of `records` rollouts came to; seconds of CPU."""

    records: int
    ledger_mb: float
    state_kb: float
    first_checkpoint_s: float
    checkpoint_s: float
    resume_s: float
    audit_s: float
    audit_mb: float


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--records", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    found = []
    for records in options.parse_args().records:
        # A process for each: memory that a long run touched would hide in the next one's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found.append(process.submit(measure, records).result())
        Console(width=WIDTH).print(table(found))


def table(found: list[LongRun]) -> Table:
    """A line for each run."""
    titles = ("rollouts", "ledger MB", "state KB", "checkpoint ms", "at first", "resume s")
    drawn = Table(*titles, "audit s", "audit MB")
    for run in found:
        drawn.add_row(
            f"{run.records:,}",
            f"{run.ledger_mb:.1f}",
            f"{run.state_kb:.1f}",
            f"{1000 * run.checkpoint_s:.2f}",
            f"{1000 * run.first_checkpoint_s:.2f}",
            f"{run.resume_s:.2f}",
            f"{run.audit_s:.2f}",
            f"{run.audit_mb:.0f}",
        )
    return drawn


def measure(records: int) -> LongRun:
    """A run of `records` rollouts, from its first checkpoint to its audit."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(ERROR))
    with tempfile.TemporaryDirectory(prefix="onstream-bench-") as scratch, redis(scratch) as bus:
        run_dir = Path(scratch) / RUN
        run_dir.mkdir()
        checkpoint_times = settle_all(bus, run_dir, records)
        resumed_s = resume(bus, run_dir)
        before = psutil.Process().memory_info().rss
        reset_peak()
        began = time.process_time()
        found = counted(audit(run_dir, bus))
        audit_s = time.process_time() - began
        assert (found["issued"], found["lost"]) == (records, 0), found
        newest = max(checkpoint.by_step(run_dir / checkpoint.FOLDER).items())[1]
        return LongRun(
            records=records,
            ledger_mb=(run_dir / LEDGER).stat().st_size / 1e6,
            state_kb=(newest / checkpoint.STATE).stat().st_size / 1e3,
            first_checkpoint_s=median(checkpoint_times[:LAST]),
            checkpoint_s=median(checkpoint_times[-LAST:]),
            resume_s=resumed_s,
            audit_s=audit_s,
            audit_mb=(peak_rss() - before) / 1e6,
        )


def settle_all(bus: Bus, run_dir: Path, records: int) -> list[float]:
    """Issue and settle `records` rollouts; returns the seconds of each checkpoint."""
    lease = bus.lease.acquire(3600)
    bus.lease.set_issued(lease, records)
    checkpointing = new_checkpointing(bus, run_dir, None)
    times = []
    for step, first in enumerate(range(1, records + 1, BATCH), start=1):
        numbers = range(first, min(first + BATCH, records + 1))
        for number in numbers:
            checkpointing.acknowledgements.take_without_entry(number)
        checkpointing.acknowledgements.settle(settled(numbers, step))
        if step % INTERVAL == 0 or numbers[-1] == records:
            began = time.process_time()
            checkpointing.start(position(step, records), NoModel())
            checkpointing.collect()
            times.append(time.process_time() - began)
    return times


def resume(bus: Bus, run_dir: Path) -> float:
    """Seconds from the newest checkpoint to a trainer's bookkeeping that goes on from it."""
    began = time.process_time()
    newest = checkpoint.load_newest(run_dir / checkpoint.FOLDER)
    assert newest is not None
    new_checkpointing(bus, run_dir, newest.state)
    return time.process_time() - began


def new_checkpointing(
    bus: Bus, run_dir: Path, state: checkpoint.TrainerState | None
) -> Checkpointing:
    """The trainer's own, at the start of the run or from a checkpoint's `state`."""
    lease = bus.lease.current or bus.lease.acquire(3600)
    return Checkpointing(
        bus, lease, run_dir, CheckpointSettings(), state, max_unacked_bytes=256 << 20
    )


def settled(numbers: range, step: int) -> list[Settled]:
    """The fates of a step's rollouts."""
    return [
        Settled(number, "trained" if number % STALE_EVERY else "stale", step) for number in numbers
    ]


def position(step: int, issued: int) -> TrainerPosition:
    """A trainer's, with a policy that has no files."""
    policy = PolicyVersion(step, "none", "none", 0)
    return TrainerPosition(step, policy, issued, JournalMark("journal", 0, 0))


@contextlib.contextmanager
def redis(scratch: str) -> Iterator[Bus]:
    """A server of the run's own."""
    server = EmbeddedRedis(Path(scratch) / "redis", max_memory_mb=512)
    bus = Bus.connect(server.start(), RUN, consumer="bench", block_s=0.1, connect_timeout_s=30)
    try:
        yield bus
    finally:
        bus.close()
        server.stop()


if __name__ == "__main__":
    main()
