"""The worker loop, on a real Redis: what it moves, what it gives up, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from onstream.pipeline.errors import Exit, LeaseLost, UserError
from onstream.pipeline.loop import Worker, run_worker
from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.records import PolicyVersion, Rollout, StageName, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.run_state import WorkerState
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from tests.entries import claim_pending
from tests.pipeline.stages import Passing, rollout, ticket

LASTING = DeliverySettings(lease=5.0, max_deliveries=3, drain=2.0)


@pytest.fixture
def second_bus(redis_url: str, run_name: str) -> Iterator[Bus]:
    bus = Bus.connect(redis_url, run_name, consumer="second", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.close()


def put(bus: Bus, stage: StageName, *payloads: tuple[int, bytes]) -> None:
    """Write entries as a hop would, from an entry of the tickets' stream made for it."""
    for number, payload in payloads:
        bus.connection.ask("XADD", bus.keys.streams[stage], "*", "n", number, "b", payload)


def trained(number: int) -> bytes:
    """A rollout as the trainer gets it."""
    return encode(rollout(ticket(number, ("train",))))


def issue(bus: Bus, count: int) -> None:
    lease = bus.lease.acquire(5)
    assert bus.lease.issue(
        lease, 0, [ticket(number) for number in range(1, count + 1)], max_backlog=1000
    )
    bus.lease.release(lease)


def finish(bus: Bus) -> None:
    lease = bus.lease.acquire(5)
    bus.lease.finish(lease)
    bus.lease.release(lease)


def announce(bus: Bus, lease: Lease, step: int) -> None:
    bus.lease.announce(lease, PolicyVersion(step, f"digest {step}", "policies/x", 1))


def stop_when(condition: Callable[[], bool]) -> threading.Thread:
    """Send this process SIGTERM once `condition` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_ticket_becomes_a_rollout_for_the_first_stage_of_its_route(
    bus: Bus, second_bus: Bus
) -> None:
    issue(bus, 3)
    stage = Passing("generate")
    stop_when(lambda: second_bus.state.backlog()["verify"] == 3)

    assert run_worker(stage, bus, LASTING, block_s=0.2) == Exit.OK

    moved = [decode_work(entry.payload) for entry in second_bus.streams.read("verify", 10)]
    assert [record.number for record in moved] == [1, 2, 3]
    assert all(
        isinstance(record, Rollout) and record.route == ["verify", "train"] for record in moved
    )
    assert bus.state.backlog() == {
        "generate": 0,
        "act": 0,
        "verify": 3,
        "score": 0,
        "train": 0,
    }
    assert bus.state.ready_stages() == {"generate"}


def test_the_loop_strikes_the_stage_from_the_route_and_notes_its_time(
    bus: Bus, second_bus: Bus
) -> None:
    put(bus, "verify", (1, encode(rollout(ticket(1, ("verify", "score", "train"))))))
    stop_when(lambda: second_bus.state.backlog()["score"] == 1)

    run_worker(Passing("verify"), bus, LASTING, block_s=0.2)

    moved = decode_work(second_bus.streams.read("score", 1)[0].payload)
    assert isinstance(moved, Rollout)
    assert moved.route == ["score", "train"]
    assert [(timing.stage, timing.worker) for timing in moved.timings] == [("verify", "tester")]
    assert moved.timings[0].taken <= moved.timings[0].done


def test_bytes_that_do_not_decode_become_a_dead_letter_and_a_tombstone(
    bus: Bus, second_bus: Bus
) -> None:
    put(
        bus,
        "verify",
        (7, b"\xc1 no record"),
        (8, encode(ticket(8))),
        (9, encode(rollout(ticket(3)))),
    )
    stop_when(lambda: second_bus.state.backlog()["train"] == 3)

    run_worker(Passing("verify"), bus, LASTING, block_s=0.2)

    letters = bus.state.dead_letters()
    assert (letters[0].number, letters[0].payload, letters[0].stage) == (
        7,
        b"\xc1 no record",
        "verify",
    )
    assert "do not decode" in letters[0].reason
    assert letters[1].reason == "a ticket in the stream of verify"
    assert letters[2].reason == "the entry has the number 9 and its record 3"
    tombstones = [decode_work(entry.payload) for entry in second_bus.streams.read("train", 10)]
    assert tombstones[0] == Tombstone(7, "verify", letters[0].reason)
    assert bus.state.backlog()["verify"] == 0


def test_a_stage_that_gives_up_a_record_sends_it_to_the_dead_letters_with_its_words(
    bus: Bus, second_bus: Bus
) -> None:
    class Refusing(Passing):
        def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
            return [Outcome(delivery, dead="the prompt is too long") for delivery in new]

    issue(bus, 1)
    stop_when(lambda: second_bus.state.backlog()["train"] == 1)

    run_worker(Refusing("generate"), bus, LASTING, block_s=0.2)

    assert [letter.reason for letter in bus.state.dead_letters()] == ["the prompt is too long"]
    assert decode_work(bus.state.dead_letters()[0].payload) == ticket(1)
    assert decode_work(second_bus.streams.read("train", 1)[0].payload) == Tombstone(
        1, "generate", "the prompt is too long"
    )


def test_a_stopped_worker_gives_back_what_it_did_not_finish_uncounted(
    bus: Bus, second_bus: Bus
) -> None:
    class Hoarding(Passing):
        held = 0

        def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
            self.held += len(new)
            return []

    issue(bus, 5)
    stage = Hoarding("generate")
    stop_when(lambda: stage.held == 5)

    assert run_worker(stage, bus, LASTING, block_s=0.2) == Exit.OK

    assert stage.closed is False
    rows = second_bus.streams.pending_rows("generate", min_idle_s=LASTING.lease)
    assert [(row.consumer, row.deliveries) for row in rows] == [("_parked", 0)] * 5
    assert (
        bus.connection.ask(
            "XGROUP", "DELCONSUMER", bus.keys.streams["generate"], "workers", "tester"
        )
        == 0
    )


def test_a_new_worker_takes_at_once_what_a_stopped_one_gave_back(bus: Bus, second_bus: Bus) -> None:
    issue(bus, 3)
    entries = bus.streams.read("generate", 3)
    assert bus.streams.give_back("generate", [entry.id for entry in entries]) == 3
    seen: list[int] = []
    stop_when(lambda: second_bus.state.backlog()["verify"] == 3)

    run_worker(
        Passing("generate", lambda new: seen.extend(d.deliveries for d in new)),
        bus,
        LASTING,
        block_s=0.2,
    )

    assert seen == [1, 1, 1]


def test_a_worker_drains_what_it_works_on_before_it_stops(bus: Bus, second_bus: Bus) -> None:
    class Slow(Passing):
        """Finishes one record a slice, however many it was given."""

        def setup(self) -> None:
            self.held: list[Delivery] = []

        @property
        def busy(self) -> bool:  # type: ignore[override]
            return bool(self.held)

        def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
            self.held += new
            if len(self.held) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return (
                [Outcome(delivery, self.answer(delivery)) for delivery in [self.held.pop()]]
                if self.held
                else []
            )

    issue(bus, 4)
    assert run_worker(Slow("generate"), bus, LASTING, block_s=0.2) == Exit.OK
    assert bus.state.backlog() == {"generate": 0, "act": 0, "verify": 4, "score": 0, "train": 0}


def test_a_record_that_was_never_finished_is_taken_over_when_its_lease_ends(
    bus: Bus, second_bus: Bus
) -> None:
    issue(bus, 1)
    assert len(second_bus.streams.read("generate", 1)) == 1
    stop_when(lambda: second_bus.state.backlog()["verify"] == 1)

    assert (
        run_worker(Passing("generate"), bus, DeliverySettings(lease=0.5), block_s=0.05) == Exit.OK
    )

    assert second_bus.state.backlog()["generate"] == 0


def test_a_lease_is_renewed_while_the_worker_lives(bus: Bus, second_bus: Bus) -> None:
    renewals = 0

    def long(new: Sequence[Delivery]) -> None:
        nonlocal renewals
        before_s = 0.0
        while new and renewals < 6:  # at a third of the lease each
            idle_s = second_bus.streams.pending_rows("generate")[0].idle_s
            renewals += idle_s < before_s
            before_s = idle_s
            time.sleep(0.02)

    issue(bus, 1)
    stop_when(lambda: second_bus.state.backlog()["verify"] == 1)
    run_worker(Passing("generate", long), bus, DeliverySettings(lease=0.6), block_s=0.05)
    assert renewals == 6


def test_a_record_handed_out_too_often_is_a_dead_letter(bus: Bus, second_bus: Bus) -> None:
    issue(bus, 1)
    second_bus.streams.read("generate", 1)
    for _ in range(2):
        claim_pending(second_bus, "generate")
    assert second_bus.streams.pending_rows("generate")[0].deliveries == LASTING.max_deliveries
    stop_when(lambda: second_bus.state.backlog()["train"] == 1)

    run_worker(
        Passing("generate"), bus, DeliverySettings(lease=0.5, max_deliveries=3), block_s=0.05
    )

    assert (
        bus.state.dead_letters()[0].reason
        == "handed out 3 times and never finished; max_deliveries is 3"
    )


def test_a_suspect_is_taken_alone(bus: Bus, second_bus: Bus) -> None:
    issue(bus, 4)
    first = second_bus.streams.read("generate", 4)
    claim_pending(second_bus, "generate", count=2)  # the first two were handed out twice
    slices: list[list[int]] = []
    stop_when(lambda: second_bus.state.backlog()["verify"] == 4)

    stage = Passing(
        "generate",
        lambda new: slices.append([delivery.number for delivery in new]) if new else None,
    )
    run_worker(stage, bus, DeliverySettings(lease=0.5), block_s=0.05)

    assert len(first) == 4
    assert slices == [[3, 4], [1], [2]]


def test_every_worker_ends_when_the_run_has_finished(bus: Bus, second_bus: Bus) -> None:
    stage = Passing("score")
    finish(second_bus)
    assert run_worker(stage, bus, LASTING, block_s=5) == Exit.OK
    assert stage.closed is True


def test_a_worker_that_is_up_before_a_finished_run_goes_on_stays_and_does_its_part(
    bus: Bus, second_bus: Bus
) -> None:
    """The earlier end of the run must not send it away: its trainer is about to undo that."""

    def trainer() -> None:
        beats = set[bytes]()
        while len(beats) < 3:  # it has looked for the end of the run by then
            beats.update(second_bus.connection.ask("HVALS", second_bus.keys.workers))
            time.sleep(0.01)
        lease = second_bus.lease.acquire(30)
        second_bus.lease.reopen(lease)
        second_bus.lease.issue(lease, 0, [ticket(1), ticket(2)], max_backlog=1000)
        while second_bus.state.backlog()["verify"] < 2:
            time.sleep(0.01)
        announce(second_bus, lease, step=4)
        second_bus.lease.finish(lease)

    lease = second_bus.lease.acquire(5)
    announce(second_bus, lease, step=2)
    second_bus.lease.finish(lease)
    second_bus.lease.release(lease)
    threading.Thread(target=trainer, daemon=True).start()
    stage = Passing("generate")
    assert run_worker(stage, bus, DeliverySettings(lease=0.5), block_s=0.05, max_steps=4) == Exit.OK
    assert stage.closed is True
    assert second_bus.state.backlog()["verify"] == 2


def test_a_signal_ends_a_blocked_read_at_once(bus: Bus, second_bus: Bus) -> None:
    told: list[float] = []

    def waits() -> bool:
        if any(state.state == "running" for state in second_bus.state.workers()):
            told.append(time.monotonic())
        return bool(told)

    stop_when(waits)
    assert run_worker(Passing("score"), bus, LASTING, block_s=60) == Exit.OK
    assert time.monotonic() - told[0] < 60


def test_a_signal_during_setup_ends_the_worker(bus: Bus) -> None:
    class Loading(Passing):
        def setup(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    started = time.monotonic()
    assert run_worker(Loading("score"), bus, LASTING, block_s=1) == Exit.OK
    assert time.monotonic() - started < 60


def test_a_handler_that_fails_ends_the_worker_and_its_records_stay_pending(bus: Bus) -> None:
    def fail(new: Sequence[Delivery]) -> None:
        if new:
            raise ZeroDivisionError("a bug")

    issue(bus, 2)
    assert run_worker(Passing("generate", fail), bus, LASTING, block_s=0.2) == Exit.FAILED
    assert bus.state.pending_counts()["generate"] == 2


def test_a_worker_whose_handler_hangs_ends_with_code_4_and_its_record_goes_to_another(
    bus: Bus, redis_url: str, run_name: str
) -> None:
    issue(bus, 1)
    script = (
        "import sys, time\n"
        "from onstream.pipeline.loop import run_worker\n"
        "from onstream.pipeline.redis.bus import Bus\n"
        "from onstream.settings.sections.run import DeliverySettings\n"
        "from tests.pipeline.stages import Passing\n"
        f"bus = Bus.connect({redis_url!r}, {run_name!r}, "
        "consumer='hangs', block_s=0.1, connect_timeout_s=5)\n"
        "stage = Passing('generate', lambda new: time.sleep(60 * len(new)))\n"
        "sys.exit(run_worker(stage, bus, DeliverySettings(lease=0.5, max_handle=1), block_s=0.1))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
    )

    assert ran.returncode == Exit.STUCK
    stop_when(lambda: bus.state.backlog()["verify"] == 1)
    assert run_worker(Passing("generate"), bus, DeliverySettings(lease=0.5), block_s=0.1) == Exit.OK


def test_a_worker_gives_up_when_redis_does_not_come_back(tmp_path: Path, run_name: str) -> None:
    server = EmbeddedRedis(tmp_path, max_memory_mb=64)
    bus = Bus.connect(
        server.start(), run_name, consumer="tester", block_s=0.1, connect_timeout_s=0.4
    )
    issue(bus, 1)
    assert (
        run_worker(Passing("generate", lambda new: server.stop()), bus, LASTING, block_s=0.1)
        == Exit.UNREACHABLE
    )
    bus.close()


def test_a_user_error_in_setup_reaches_the_caller(bus: Bus) -> None:
    class Misconfigured(Passing):
        def setup(self) -> None:
            raise UserError(
                "no model at nowhere/", expected="a model directory", next_step="Set model.name."
            )

    with pytest.raises(UserError, match="no model at nowhere/; expected a model directory"):
        run_worker(Misconfigured("generate"), bus, LASTING, block_s=0.2)
    [last] = bus.state.last_heartbeats()
    assert (last.state, last.detail) == (
        "failed",
        "no model at nowhere/; expected a model directory. Set model.name.",
    )
    assert bus.state.workers() == []


class Holding(Passing):
    """A trainer: keeps every entry until it acknowledges it."""

    holds_entries = True

    def __init__(self) -> None:
        super().__init__("train")
        self.taken: list[int] = []
        self.ids: list[bytes] = []

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        self.taken += [delivery.number for delivery in new]
        self.ids += [delivery.entry_id for delivery in new]
        return []


def test_the_trainer_reads_its_pending_entries_again_first_and_in_order_whoever_had_them(
    bus: Bus, second_bus: Bus
) -> None:
    put(bus, "train", *((number, encode(rollout(ticket(number)))) for number in range(1, 7)))
    second_bus.streams.read("train", 2)
    bus.streams.read("train", 2)
    trainer = Holding()
    stop_when(lambda: len(trainer.taken) == 6)

    assert run_worker(trainer, bus, LASTING, block_s=0.2) == Exit.OK

    assert trainer.taken == [1, 2, 3, 4, 5, 6]
    assert bus.state.pending_counts()["train"] == 6


def test_the_trainer_is_given_each_entry_once_and_then_finds_what_a_lost_reply_carried(
    bus: Bus, second_bus: Bus
) -> None:
    put(bus, "train", *((number, trained(number)) for number in range(1, 4)))
    worker = Worker(Holding(), bus, DeliverySettings(lease=0.5), 0.05)
    worker.turn()
    bus.streams.read("train", 1)
    put(bus, "train", (4, trained(4)))
    bus.streams.read(
        "train", 1
    )  # entry 4 was delivered to this consumer, and the loop never saw it
    worker.intake.reconnect()

    worker.turn()

    assert worker.stage.taken == [1, 2, 3, 4]  # type: ignore[attr-defined]


def test_a_trainer_that_was_replaced_ends(bus: Bus, second_bus: Bus) -> None:
    class Leased(Holding):
        def setup(self) -> None:
            bus.lease.acquire(5)
            second_bus.connection.ask("DEL", bus.keys.lease)
            second_bus.lease.acquire(5)

    assert run_worker(Leased(), bus, LASTING, block_s=0.2) == Exit.REFUSED
    with pytest.raises(LeaseLost):
        bus.lease.finish(bus.lease.current)  # type: ignore[arg-type]


def test_heartbeats_tell_what_a_worker_does(bus: Bus, second_bus: Bus) -> None:
    issue(bus, 2)
    seen: list[WorkerState] = []

    def told() -> bool:
        seen[:] = [state for state in second_bus.state.workers() if state.done == 2]
        return bool(seen)

    stop_when(told)
    run_worker(Passing("generate"), bus, DeliverySettings(lease=0.5), block_s=0.05)

    assert (seen[0].worker, seen[0].stage, seen[0].pid, seen[0].detail) == (
        "tester",
        "generate",
        os.getpid(),
        "passing records on",
    )
    assert second_bus.state.workers() == []


def test_a_record_that_somebody_else_finished_is_not_counted(bus: Bus, second_bus: Bus) -> None:
    issue(bus, 1)

    def overtaken(new: Sequence[Delivery]) -> None:
        for delivery in new:
            second_bus.streams.move(
                "generate",
                [Move(delivery.entry_id, [Out("verify", 1, encode(rollout(ticket(1))))])],
            )

    stage = Passing("generate", overtaken)
    worker = Worker(stage, bus, LASTING, 0.05)
    worker.turn()

    assert worker.state.done == 0
    assert bus.state.backlog()["verify"] == 1
