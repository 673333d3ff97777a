"""A live run into whose streams an adversary writes mutated records: it ends right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

import pytest
from msgspec.structs import replace

from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.records import Rollout, StageName, Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import all_letters
from onstream.pipeline.stage import Delivery, Outcome, Stage, Stats
from onstream.settings.route import route_of
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.inspection.audit import audit
from onstream.workers.inspection.dead_letters import dead_by_reason
from onstream.workers.inspection.status import status
from onstream.workers.teacher.stage import Teacher
from onstream.workers.verifier.stage import Verifier
from tests.mutations import MutatedEntry, Mutator
from tests.workers.trainer.driver import Run, rollout

MUTATIONS = 10_000
AT_ONCE = 250
STREAMS: tuple[StageName, ...] = ("generate", "verify", "score", "train")


class Writer:
    """Stands for the generator, which would load a model: it answers tickets at once."""

    name: StageName = "generate"
    holds_entries = False
    room = 64
    busy = False

    def __init__(self, bus: Bus) -> None:
        self.stats = Stats()
        self._bus = bus

    def setup(self) -> None:
        """Nothing to load."""

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """A rollout of the newest version for each ticket."""
        policy = self._bus.state.newest_policy()
        version = policy.number if policy else 0
        return [Outcome(delivery, answer(delivery.ticket, version)) for delivery in new]

    def close(self, *, finished: bool) -> None:
        """Nothing to release."""


def answer(ticket: Ticket, version: int) -> Rollout:
    return rollout(
        ticket,
        version,
        route=list(ticket.route),
        reward=None,
        info={"answer": "some words"},
        timings=[],
    )


class LiveRun:
    """A real trainer and verifier, and a teacher where the run has one, each in the real loop, and
    a writer before them.
    """

    def __init__(self, job: Run, connect: Callable[[str], Bus], opened: ExitStack) -> None:
        self.job = job
        settings = job.settings()
        writer_bus = connect("writer")
        verifier_bus = connect("verifier")
        stages: list[tuple[Stage, Bus]] = [
            (Writer(writer_bus), writer_bus),
            (Verifier(settings, verifier_bus), verifier_bus),
        ]
        if "score" in route_of(settings):
            teacher_bus = connect("teacher")
            stages.append((Teacher(settings, teacher_bus), teacher_bus))
        self.workers = [
            Worker(stage, stage_bus, DeliverySettings(lease=60), block_s=0)
            for stage, stage_bus in stages
        ]
        for worker in self.workers:
            worker.stage.setup()
            opened.callback(worker.stage.close, finished=True)
            job.bus.state.mark_ready(worker.stage.name)

    def turn(self) -> None:
        self.job.worker.block_s = 0
        for worker in (*self.workers, self.job.worker):
            worker.turn()


class Adversary:
    """Writes mutated records of every kind into every stream, and into the policy's key."""

    def __init__(self, job: Run) -> None:
        self._job = job
        self._bus = job.bus
        self._planner = job.trainer.tickets.planner
        self._mutator = Mutator(16)
        self._random = random.Random(12)
        self.written: list[MutatedEntry] = []

    def write(self, count: int) -> None:
        """`count` of them, of numbers that were issued, late ones above all."""
        ask = self._bus.connection.ask
        issued = self._bus.state.issued()
        for _ in range(count):
            record = self._record(self._random.randint(max(1, issued - 200), issued))
            entry = self._mutator.entry(record, issued)
            self.written.append(entry)
            stream = self._bus.keys.streams[self._random.choice(STREAMS)]
            ask("XADD", stream, "*", *(part for pair in entry.fields.items() for part in pair))
        policy = encode(self._job.trainer.policy)
        ask("SET", self._bus.keys.policy, self._mutator.bytes_of(policy))
        ask("XADD", self._bus.keys.policies, "*", "b", self._mutator.bytes_of(policy))
        ask("XADD", self._bus.keys.dead, "*", "n", "9" * 30, "deliveries", "x", "b", "odd")
        ask("XADD", self._bus.keys.requests, "*", "do", "requeue", "n", "1" * 5000)

    def _record(self, number: int) -> Ticket | Rollout | Tombstone:
        ticket = self._planner.ticket(number, 0)
        kind = self._random.random()
        if kind < 0.2:
            return ticket
        if kind < 0.3:
            return Tombstone(number, "verify", "given up")
        made = answer(ticket, 0)
        if kind < 0.6:
            made.reward = 1.0
            made.reward_parts = {"similarity": 0.5}
        made.route = list(self._random.choice((["train"], ["score", "train"], made.route)))
        return made


@pytest.fixture
def connect(redis_url: str, run_name: str) -> Iterator[Callable[[str], Bus]]:
    with ExitStack() as opened:
        yield lambda consumer: opened.enter_context(
            closing(
                Bus.connect(
                    redis_url, run_name, consumer=consumer, block_s=0.01, connect_timeout_s=5
                )
            )
        )


def test_mutated_records_in_every_stream_stop_no_stage_and_lose_no_rollout(
    run: Callable[..., Run], connect: Callable[[str], Bus]
) -> None:
    job = run(
        deployment__stages=["generate", "verify", "score", "train"],
        trainer__max_steps=20,
        delivery__lease=60,
        checkpoint__interval=5,
    )
    with ExitStack() as opened:
        live = LiveRun(job, connect, opened)
        while not job.bus.state.issued():
            live.turn()
        adversary = Adversary(job)
        for at in range(MUTATIONS // AT_ONCE):
            adversary.write(AT_ONCE)
            live.turn()
            if at == 20:
                job.start()  # a new trainer, which takes up all that is pending
        while not job.bus.state.finished():
            live.turn()
        while any(job.bus.state.backlog()[stage] for stage in STREAMS[:-1]):
            live.turn()

    counts = job.counts()
    assert ("lost" not in counts, "duplicated" not in counts) == (True, True)
    assert counts["trained"] >= 20
    assert job.bus.state.newest_policy().number == 20  # type: ignore[union-attr]
    letters = list(all_letters(job.bus, job.trainer.directory.path))
    assert all(letter.reason for letter in letters if letter.stage)
    dead = {letter.payload for letter in letters}
    unread = set(_payloads(job.bus, "train"))  # the run has ended before it came to them
    for entry in adversary.written:
        if entry.payload not in dead and entry.payload not in unread:
            assert decode_work(entry.payload).number <= job.bus.state.issued()
    assert sum(entry.payload in dead for entry in adversary.written) > MUTATIONS / 2
    dead_by_reason(job.bus, job.trainer.directory.path)
    status(job.bus)


def test_a_ticket_whose_route_leads_where_nobody_works_is_a_dead_letter_and_the_run_ends_right(
    run: Callable[..., Run], connect: Callable[[str], Bus]
) -> None:
    job = run(deployment__stages=["generate", "verify", "train"], trainer__max_steps=4)
    ask = job.bus.connection.ask
    with ExitStack() as opened:
        live = LiveRun(job, connect, opened)
        job.worker.turn()  # the first tickets are out, and nobody has taken one
        [(entry_id, fields)] = ask("XRANGE", job.bus.keys.streams["generate"], "-", "+", "COUNT", 1)
        asked = decode_work(fields[b"b"])
        assert isinstance(asked, Ticket)
        elsewhere = encode(replace(asked, route=["score", "train"]))
        ask("XDEL", job.bus.keys.streams["generate"], entry_id)
        ask("XADD", job.bus.keys.streams["generate"], "*", "n", asked.number, "b", elsewhere)
        while not job.bus.state.finished():
            live.turn()

    [letter] = all_letters(job.bus, job.trainer.directory.path)
    expected = "the route generate → score → train; rollouts of this run pass generate → verify"
    assert (letter.number, letter.reason[: len(expected)]) == (asked.number, expected)
    assert job.bus.state.backlog()["score"] == 0
    found = audit(job.trainer.directory.path, job.bus)
    assert (found["lost"], found["in_flight"], found["duplicated"]) == ([], [], [])
    assert found["dead"] == [f"{job.bus.run}/{asked.number}"]


def _payloads(bus: Bus, stage: StageName) -> list[bytes]:
    entries = bus.connection.ask("XRANGE", bus.keys.streams[stage], "-", "+")
    return [fields.get(b"b", b"") for _, fields in entries]
