"""What a worker gives to the one loop (`onstream.pipeline.loop`), and what the loop gives back to
it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from onstream.pipeline.records import Rollout, StageName, Ticket, Timing, Tombstone, Work


@dataclass(frozen=True)
class Delivery:
    """One stream entry in this worker's hands. `deliveries` counts how often it was handed out,
    this time included.
    """

    entry_id: bytes
    number: int
    record: Work
    payload_bytes: int
    deliveries: int
    taken: float  # seconds since the epoch


@dataclass(frozen=True)
class Outcome:
    """A handler is done with `delivery`: the record that goes on, or the reason why none does.

    `record` moves to the first stage of its own route, and a tombstone to the trainer. With `dead`
    set, the entry goes to the dead-letter stream with those words, and a tombstone to the trainer.
    The loop strikes the handler's stage from the route and appends its timing; the handler need do
    neither. With `elsewhere` set, somebody else has moved the entry, a job say.
    """

    delivery: Delivery
    record: Rollout | Tombstone | None = None
    dead: str | None = None
    elsewhere: bool = False


def complete_stage(record: Rollout, stage: StageName, worker: str, taken: float) -> None:
    """Strike `stage` from the route still to go, and note how long `worker` had the record: from
    `taken`, in seconds since the epoch.
    """
    record.route = [name for name in record.route if name != stage]
    if not record.timings or record.timings[-1].stage != stage:
        record.timings = [*record.timings, Timing(stage, worker, taken, time.time())]


@dataclass
class Stats:
    """What a worker tells of itself in its heartbeat. `detail` is what it waits for, or does, in
    words.

    The loop counts `done` and `dead` itself, except for the trainer, which counts its own.
    """

    done: int = 0
    dead: int = 0
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """One kind of worker. The loop calls these from one thread, `setup` first and `close` last.

    `holds_entries` is True for the trainer alone: its entries stay pending until a durable
    checkpoint acknowledges them, so the loop re-reads its own pending entries at the start, never
    reaps, and gives nothing back on drain.
    """

    name: StageName
    holds_entries: bool

    def setup(self) -> None:
        """Load models and open files.

        Raises:
            UserError: the worker cannot do its work with these settings; the message says what to
                change.
        """
        ...

    @property
    def room(self) -> int:
        """How many more records the worker wants now; 0 while it is full."""
        ...

    @property
    def busy(self) -> bool:
        """Whether `handle([])` has work to do. While it has, the loop does not wait for new
        records.
        """
        ...

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Take `new` records and do one bounded slice of work; returns the outcomes that are ready.

        Every delivery gets exactly one outcome, now or in a later call (none from a stage that
        holds its entries).
        """
        ...

    def close(self, *, finished: bool) -> None:
        """Release everything. `finished` tells a run that has ended from a drain in its middle."""
        ...


__all__ = ["Delivery", "Outcome", "Rollout", "Stage", "Stats", "Ticket", "Tombstone"]
