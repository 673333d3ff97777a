"""Every number is in one place, in whatever order workers read, move on, die, sleep and come late.

A machine of rules over a real Redis.
"""

from __future__ import annotations

import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import StageName, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Entry, Move, Out
from onstream.pipeline.run_files.ledger import Ledger, Settled
from onstream.workers.inspection.audit import audit, counted
from tests.entries import claim_pending
from tests.pipeline.stages import rollout, ticket

WORKERS: dict[str, StageName] = {
    "generate-0": "generate",
    "generate-1": "generate",
    "verify-0": "verify",
    "verify-1": "verify",
}
NEXT: dict[StageName, StageName] = {"generate": "verify", "verify": "train"}
MOST = 40
workers = st.sampled_from(sorted(WORKERS))
counts = st.integers(1, 4)


class Streams(RuleBasedStateMachine):
    """One run: two generators, two verifiers, a trainer that keeps a ledger, and any of them may be
    killed at any rule.
    """

    url: ClassVar[str]

    @initialize()
    def start(self) -> None:
        """A run of its own, and everybody's bus."""
        self.run = f"machine-{uuid.uuid4().hex[:12]}"
        self.directory = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self.directory.name) / "trained.jsonl")
        self.buses = {
            name: Bus.connect(self.url, self.run, consumer=name, block_s=0.1, connect_timeout_s=5)
            for name in (*WORKERS, "trainer")
        }
        self.trainer = self.buses["trainer"]
        self.lease = self.trainer.lease.acquire(600)
        self.issued = 0
        self.hands: dict[str, list[Entry]] = {name: [] for name in WORKERS}
        # what workers were about to move on when they fell asleep
        self.late: list[tuple[str, list[Move]]] = []
        self.taken: dict[bytes, Entry] = {}  # the trainer's entries that no checkpoint holds
        self.payable: dict[bytes, int] = {}  # numbers by the entries whose checkpoint is durable
        self.settled: set[int] = set()

    def teardown(self) -> None:
        """Close what was opened."""
        if hasattr(self, "buses"):
            for key in self.trainer.connection.client.scan_iter(f"{{onstream:{self.run}}}:*"):
                self.trainer.connection.client.delete(key)
            for bus in self.buses.values():
                bus.close()
            self.directory.cleanup()

    @precondition(lambda self: self.issued < MOST)
    @rule(count=counts, repeats=st.booleans())
    def issue(self, count: int, repeats: bool) -> None:
        """Tickets; the call is made twice where its first reply was lost."""
        tickets = [ticket(number) for number in range(self.issued + 1, self.issued + count + 1)]
        for _ in range(1 + repeats):
            assert self.trainer.lease.issue(self.lease, self.issued, tickets, max_backlog=1000)
        self.issued += count

    @rule(name=workers, count=counts)
    def read(self, name: str, count: int) -> None:
        """Take new entries."""
        self.hands[name] += self.buses[name].streams.read(WORKERS[name], count)

    @rule(name=workers, count=counts, dead=st.booleans(), repeats=st.booleans())
    def move_on(self, name: str, count: int, dead: bool, repeats: bool) -> None:
        """Move some of what is in hand on, or give it up."""
        moves = [self._move(name, entry, dead) for entry in self.hands[name][:count]]
        del self.hands[name][:count]
        for _ in range(1 + repeats):
            self.buses[name].streams.move(WORKERS[name], moves)

    @rule(name=workers, count=counts, dead=st.booleans())
    def fall_asleep(self, name: str, count: int, dead: bool) -> None:
        """About to move entries on, but not yet."""
        self.late.append(
            (name, [self._move(name, entry, dead) for entry in self.hands[name][:count]])
        )

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def wake_up(self, data: st.DataObject) -> None:
        """Settle now, whoever has the records by now."""
        name, moves = self.late.pop(data.draw(st.integers(0, len(self.late) - 1)))
        self.buses[name].streams.move(WORKERS[name], moves)

    @rule(name=workers)
    def be_killed(self, name: str) -> None:
        """All that it knew is gone. What it was about to do may still have been on its way to
        Redis.
        """
        self.hands[name] = []

    @rule(name=workers)
    def take_up_what_is_mine(self, name: str) -> None:
        """What the one of the same name had before it."""
        self.hands[name] = claim_pending(self.buses[name], WORKERS[name])

    @rule(name=workers)
    def reap(self, name: str) -> None:
        """Claim what anybody has in hand, as if its lease were over."""
        bus = self.buses[name]
        stage = WORKERS[name]
        claimed = bus.streams.claim(stage, bus.streams.pending_rows(stage))
        self.hands[name] = [
            entry for entry in self.hands[name] if entry.id not in {other.id for other in claimed}
        ] + claimed

    @rule(name=workers)
    def renew(self, name: str) -> None:
        """A heartbeat's renewal."""
        self.buses[name].streams.renew(WORKERS[name], [entry.id for entry in self.hands[name]])

    @rule(name=workers)
    def give_back_and_retire(self, name: str) -> None:
        """A drain."""
        self.buses[name].streams.give_back(WORKERS[name], [entry.id for entry in self.hands[name]])
        self.buses[name].streams.retire(WORKERS[name])
        self.hands[name] = []

    @rule(name=workers)
    def forget_dead(self, name: str) -> None:
        """Forget consumers, however lately they were heard of."""
        self.buses[name].streams.forget_dead_consumers(WORKERS[name], -1)

    @rule(count=st.integers(1, 8))
    def train(self, count: int) -> None:
        """The trainer takes entries, and counts a number once."""
        self.taken.update((entry.id, entry) for entry in self.trainer.streams.read("train", count))

    @rule()
    def checkpoint(self) -> None:
        """The fates of all that was taken become durable."""
        fresh = {entry.number for entry in self.taken.values()} - self.settled
        self.ledger.append(Settled(number, "trained", 1) for number in sorted(fresh))
        self.settled |= fresh
        self.payable.update((entry.id, entry.number) for entry in self.taken.values())
        self.taken = {}

    @rule(repeats=st.booleans())
    def acknowledge(self, repeats: bool) -> None:
        """Entries whose fate is durable go."""
        for _ in range(1 + repeats):
            self.trainer.lease.acknowledge(self.lease, self.payable)
        self.payable = {}

    @rule()
    def another_trainer(self) -> None:
        """The trainer is killed. The next one takes the lease, and finds the pending entries and
        the ledger.
        """
        old = self.lease
        self.lease = self.trainer.lease.acquire(600)
        assert self.lease.epoch > old.epoch
        found = self.trainer.streams.claim(
            "train", list(self.trainer.streams.all_pending_rows("train"))
        )
        self.taken = {entry.id: entry for entry in found}
        self.settled = {line.number for line in self.ledger.read()}
        self.payable = {}

    @invariant()
    def nothing_is_lost_and_nothing_doubled(self) -> None:
        """The audit's own count, and what it rests on."""
        found = counted(audit(Path(self.directory.name), self.trainer))
        assert (found["issued"], found["lost"], found["duplicated"]) == (self.issued, 0, 0)
        places = Counter(
            number
            for stage in ("generate", "verify", "train")
            for number in self.trainer.state.numbers(stage)
        )
        assert set(places.values()) <= {1}
        assert set(places) | self.settled == set(range(1, self.issued + 1))
        assert Counter(self.trainer.state.dead_numbers()).keys() <= set(range(1, self.issued + 1))

    def _move(self, name: str, entry: Entry, dead: bool) -> Move:
        stage = WORKERS[name]
        if dead:
            letter = Out("dead", entry.number, entry.payload, "given up", entry.deliveries)
            return Move(
                entry.id,
                [
                    letter,
                    Out("train", entry.number, encode(Tombstone(entry.number, stage, "given up"))),
                ],
            )
        return Move(
            entry.id,
            [Out(NEXT[stage], entry.number, encode(rollout(ticket(entry.number), tokens=2)))],
        )


def test_in_any_order_of_deliveries_deaths_and_drops_every_number_is_in_one_place(
    redis_url: str,
) -> None:
    Streams.url = redis_url
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Streams,
        settings=settings(max_examples=40, stateful_step_count=40, suppress_health_check=checks),
    )
