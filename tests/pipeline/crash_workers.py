"""The processes of the crash test: two kinds of workers, and a trainer that keeps a ledger in place
of checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from onstream.pipeline.loop import run_worker
from onstream.pipeline.records import StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.sections.run import DeliverySettings
from tests.pipeline.stages import Passing, ticket

LEASE_S = 0.5
PATIENCE_S = 20.0
ISSUED_AT_ONCE = 40
WINDOW = 200
SETTLED_AT_ONCE = 25


class Ledger(Passing):
    """Issues tickets a window ahead, settles what comes in a durable file, and acknowledges it only
    then.
    """

    holds_entries = True

    def __init__(self, bus: Bus, path: Path, records: int) -> None:
        super().__init__("train")
        self.bus = bus
        self.path = path
        self.records = records

    def setup(self) -> None:
        """Become the trainer, and read what is settled. A line that a kill tore is cut away."""
        self.lease = self.bus.lease.acquire(5)
        whole = [line for line in read_lines(self.path) if line.endswith("\n")]
        self.path.write_text("".join(whole))
        self.settled = {line for line in whole if '"' in line}
        self.held: list[Delivery] = []
        self.count = len(self.settled)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Settle in lots; issue; finish."""
        self.held += new
        if len(self.held) >= SETTLED_AT_ONCE or self.count + len(self.held) >= self.records:
            self._settle()
        issued = self.bus.state.issued()
        if issued < self.records and issued - self.count <= WINDOW:
            numbers = range(issued + 1, min(issued + ISSUED_AT_ONCE, self.records) + 1)
            assert self.bus.lease.issue(
                self.lease, issued, [ticket(number) for number in numbers], max_backlog=10_000
            )
        # What a trainer had settled and not yet acknowledged when it was killed comes once more.
        if self.count >= self.records and not self.bus.state.backlog()["train"]:
            self.bus.lease.finish(self.lease)
        return []

    def _settle(self) -> None:
        lines = [
            json.dumps([delivery.number, delivery.entry_id.decode()]) + "\n"
            for delivery in self.held
        ]
        fresh = [line for line in lines if line not in self.settled]
        with self.path.open("a") as file:
            file.writelines(fresh)
            file.flush()
            os.fsync(file.fileno())
        self.settled.update(fresh)
        self.count = len(self.settled)
        self.bus.lease.acknowledge(
            self.lease, {delivery.entry_id: delivery.number for delivery in self.held}
        )
        self.held = []


def read_lines(path: Path) -> list[str]:
    """The ledger's lines: number and entry id."""
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def slow_down(new: Sequence[Delivery]) -> None:
    """Some milliseconds a record, so that a kill finds a worker in its middle."""
    time.sleep(0.005 * len(new))


def work(stage: StageName, consumer: str, url: str, run: str, ledger: Path, records: int) -> None:
    """The body of one worker process."""
    bus = Bus.connect(url, run, consumer=consumer, block_s=0.1, connect_timeout_s=PATIENCE_S)
    body = Ledger(bus, ledger, records) if stage == "train" else Passing(stage, slow_down)
    delivery = DeliverySettings(lease=LEASE_S, max_deliveries=100, drain=1)
    sys.exit(run_worker(body, bus, delivery, block_s=0.1))
