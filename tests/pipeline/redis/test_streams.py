"""The bus on a real Redis: the fenced hop, the trainer's fenced calls, hand-over, and what it
refuses.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from onstream.pipeline.errors import Exit, LeaseLost, UserError
from onstream.pipeline.record_codec import decode_work
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import spill_dead, spilled_numbers
from onstream.pipeline.redis.keys import Keys
from onstream.pipeline.redis.lease import Lease, LeaseHeld
from onstream.pipeline.redis.streams import Move, Out, hop_batches
from onstream.pipeline.stage import Stats
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from tests.entries import claim_pending
from tests.pipeline.stages import ticket


@pytest.fixture
def other(redis_url: str, run_name: str) -> Iterator[Bus]:
    bus = Bus.connect(redis_url, run_name, consumer="other", block_s=0.2, connect_timeout_s=5)
    yield bus
    bus.close()


@pytest.fixture
def lease(bus: Bus) -> Lease:
    return bus.lease.acquire(5)


def issue(bus: Bus, lease: Lease, count: int) -> None:
    assert bus.lease.issue(
        lease, 0, [ticket(number) for number in range(1, count + 1)], max_backlog=1000
    )


def test_all_keys_of_a_run_share_one_hash_tag() -> None:
    keys = Keys("demo")
    names = [
        keys.streams["score"],
        keys.dead,
        keys.policies,
        keys.policy,
        keys.announced,
        keys.issued,
        keys.reissued,
        keys.epoch,
        keys.lease,
    ]
    names += [keys.plan, keys.ready, keys.finished, keys.workers]
    assert all(name.startswith("{onstream:demo}:") for name in names)
    assert len(set(names)) == len(names)
    assert keys.streams["score"] == "{onstream:demo}:stream:score"


def test_a_hop_moves_an_entry_once_whoever_asks_again(bus: Bus, other: Bus, lease: Lease) -> None:
    issue(bus, lease, 2)
    entries = bus.streams.read("generate", 10)
    moves = [Move(entry.id, [Out("verify", entry.number, b"rollout")]) for entry in entries]

    assert bus.streams.move("generate", moves) == [True, True]
    assert bus.streams.move("generate", moves) == [False, False]
    assert other.streams.move("generate", moves[:1]) == [False]

    assert bus.state.backlog() == {"generate": 0, "act": 0, "verify": 2, "score": 0, "train": 0}
    assert bus.state.numbers("verify") == [1, 2]


def test_one_hop_may_write_to_several_streams_or_to_none(bus: Bus, lease: Lease) -> None:
    issue(bus, lease, 3)
    first, second, third = bus.streams.read("generate", 3)
    moves = [
        Move(first.id, [Out("verify", 1, b"one")]),
        Move(second.id, [Out("dead", 2, b"two", "it broke", 4), Out("train", 2, b"tombstone")]),
        Move(third.id, []),
    ]

    assert bus.streams.move("generate", moves) == [True, True, True]

    assert bus.state.backlog() == {"generate": 0, "act": 0, "verify": 1, "score": 0, "train": 1}
    (letter,) = bus.state.dead_letters()
    assert (
        letter.number,
        letter.stage,
        letter.reason,
        letter.deliveries,
        letter.worker,
        letter.payload,
    ) == (
        2,
        "generate",
        "it broke",
        4,
        "tester",
        b"two",
    )
    assert bus.state.dead_numbers() == [2]


def test_hops_are_cut_at_32_records_and_at_a_megabyte() -> None:
    small = [Move(b"1-0", [Out("train", 1, b"x")])] * 70
    large = [Move(b"1-0", [Out("train", 1, b"x" * 400_000)])] * 5
    assert [len(batch) for batch in hop_batches(small)] == [32, 32, 6]
    assert [len(batch) for batch in hop_batches(large)] == [2, 2, 1]
    assert list(hop_batches([])) == []


def test_tickets_are_issued_once_however_often_the_call_is_repeated(bus: Bus, lease: Lease) -> None:
    tickets = [ticket(1), ticket(2)]
    assert bus.lease.issue(lease, 0, tickets, max_backlog=10)
    assert bus.lease.issue(lease, 0, tickets, max_backlog=10)
    assert bus.lease.issue(lease, 2, [ticket(3)], max_backlog=10)
    assert bus.lease.issue(lease, 0, tickets, max_backlog=10)
    assert bus.state.issued() == 3
    assert [decode_work(entry.payload) for entry in bus.streams.read("generate", 10)] == [
        ticket(1),
        ticket(2),
        ticket(3),
    ]


def test_no_ticket_until_each_stage_of_the_route_has_been_ready(bus: Bus, lease: Lease) -> None:
    bus.lease.required_stages = ["generate", "verify"]
    bus.state.mark_ready("generate")

    assert not bus.lease.issue(lease, 0, [ticket(1)], max_backlog=10)
    assert not bus.lease.reissue(lease, "token", [ticket(1)])
    assert bus.lease.missing_stages == ["verify"]
    assert bus.state.issued() == 0 and bus.streams.read("generate", 10) == []

    bus.state.mark_ready("verify")
    assert bus.lease.issue(lease, 0, [ticket(1)], max_backlog=10)
    assert bus.lease.missing_stages == []


def test_tickets_that_do_not_follow_on_the_count_are_refused(bus: Bus, lease: Lease) -> None:
    issue(bus, lease, 2)
    with pytest.raises(ValueError, match="do not follow on 2"):
        bus.lease.issue(lease, 2, [ticket(4)], max_backlog=10)
    with pytest.raises(ValueError, match="2 tickets were issued, not 1"):
        bus.lease.issue(lease, 1, [ticket(2), ticket(3)], max_backlog=10)


def test_tickets_on_top_of_some_that_redis_has_lost_are_not_issued_and_the_loss_is_told(
    bus: Bus, lease: Lease
) -> None:
    issue(bus, lease, 2)
    assert not bus.lease.issue(lease, 5, [ticket(6)], max_backlog=10)
    assert bus.lease.may_have_lost_data and bus.state.numbers("generate") == [1, 2]


def test_no_tickets_while_a_working_stream_holds_more_than_the_bound(
    bus: Bus, lease: Lease
) -> None:
    issue(bus, lease, 3)
    assert not bus.lease.issue(lease, 3, [ticket(4)], max_backlog=2)
    assert bus.state.issued() == 3
    for entry in bus.streams.read("generate", 3):
        bus.streams.move("generate", [Move(entry.id, [Out("train", entry.number, b"")])])
    assert bus.lease.issue(lease, 3, [ticket(4)], max_backlog=2), (
        "what waits for a checkpoint does not gate"
    )


def test_lost_numbers_are_issued_again_once_for_each_token(bus: Bus, lease: Lease) -> None:
    issue(bus, lease, 2)
    for _ in range(3):
        assert bus.lease.reissue(lease, "step-20", [ticket(1)])
    assert bus.lease.reissue(lease, "step-40", [ticket(1)])
    assert bus.state.numbers("generate") == [1, 2, 1, 1]


def test_the_count_of_issued_tickets_is_only_raised(bus: Bus, lease: Lease) -> None:
    assert bus.lease.set_issued(lease, 40) == 40
    assert bus.lease.set_issued(lease, 7) == 40
    assert bus.state.issued() == 40


def test_a_second_trainer_is_told_who_the_first_one_is(bus: Bus, other: Bus, lease: Lease) -> None:
    with pytest.raises(LeaseHeld, match=f"tester on {socket.gethostname()}") as held:
        other.lease.acquire(5)
    assert held.value.exit == Exit.REFUSED
    bus.lease.release(lease)
    assert other.lease.acquire(5).epoch == lease.epoch + 1


def test_the_lease_of_a_process_that_died_here_is_taken_over_at_once(
    bus: Bus, redis_url: str, run_name: str
) -> None:
    script = (
        "from onstream.pipeline.redis.bus import Bus\n"
        f"bus = Bus.connect({redis_url!r}, {run_name!r}, "
        "consumer='first', block_s=1, connect_timeout_s=5)\n"
        "bus.lease.acquire(3600)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])
    assert bus.lease.acquire(5).epoch == 2


def test_an_expired_lease_that_nobody_took_is_still_mine(bus: Bus, other: Bus) -> None:
    lease = bus.lease.acquire(0.001)
    bus.lease.renew(Lease(lease.epoch, lease.holder, 5))
    with pytest.raises(LeaseHeld):
        other.lease.acquire(5)


@pytest.mark.parametrize(
    "call",
    [
        lambda bus, lease: bus.lease.issue(lease, 0, [ticket(1)], max_backlog=10),
        lambda bus, lease: bus.lease.reissue(lease, "token", [ticket(1)]),
        lambda bus, lease: bus.lease.set_issued(lease, 4),
        lambda bus, lease: bus.lease.announce(lease, PolicyVersion(1, "d", "p", 1)),
        lambda bus, lease: bus.lease.acknowledge(lease, {b"1-0": 1}),
        lambda bus, lease: bus.lease.write_plan(lease, b"{}"),
        lambda bus, lease: bus.lease.finish(lease),
        lambda bus, lease: bus.lease.reopen(lease),
        lambda bus, lease: bus.lease.renew(lease),
        lambda bus, lease: bus.lease.release(lease),
    ],
    ids=[
        "issue",
        "reissue",
        "set_issued",
        "announce",
        "acknowledge",
        "write_plan",
        "finish",
        "reopen",
        "renew_lease",
        "release_lease",
    ],
)
def test_a_trainer_that_was_replaced_can_do_nothing(
    bus: Bus, other: Bus, lease: Lease, call: Any
) -> None:
    bus.connection.ask("DEL", bus.keys.lease)
    newer = other.lease.acquire(5)
    with pytest.raises(LeaseLost, match=f"epoch {lease.epoch} was followed by {newer.epoch}"):
        call(bus, lease)
    assert (
        bus.state.issued(),
        bus.state.newest_policy(),
        bus.state.plan(),
        bus.state.finished(),
        bus.state.backlog()["generate"],
    ) == (0, None, None, False, 0)


def test_policies_are_announced_once_and_found_by_late_comers(
    bus: Bus, other: Bus, lease: Lease
) -> None:
    first = PolicyVersion(0, "aa", "policies/000000", 10)
    second = PolicyVersion(1, "bb", "policies/000001", 10)
    for policy in (first, second, second):
        bus.lease.announce(lease, policy)
    assert other.state.newest_policy() == second
    assert other.state.announced_policies() == [first, second]


def test_the_trainer_acknowledges_in_bulk_and_twice_does_no_harm(bus: Bus, lease: Lease) -> None:
    issue(bus, lease, 1)
    (entry,) = bus.streams.read("generate", 1)
    bus.streams.move(
        "generate", [Move(entry.id, [Out("train", number, b"") for number in range(1, 1201)])]
    )
    entries = {held.id: held.number for held in bus.streams.read("train", 2000)}
    assert bus.lease.acknowledge(lease, entries) == 1200
    assert bus.lease.acknowledge(lease, entries) == 0
    assert (bus.state.backlog()["train"], bus.state.pending_counts()["train"]) == (0, 0)


def test_plan_readiness_and_the_end_are_there_for_all_to_read(
    bus: Bus, other: Bus, lease: Lease
) -> None:
    assert other.state.plan() is None
    bus.lease.write_plan(lease, b'{"seed": 1}')
    bus.state.mark_ready("verify")
    bus.lease.finish(lease)
    assert (other.state.plan(), other.state.ready_stages(), other.state.finished()) == (
        b'{"seed": 1}',
        {"verify"},
        True,
    )
    bus.lease.reopen(lease)
    assert not other.state.finished()


def test_idle_entries_are_claimed_by_one_and_renewed_ones_by_none(
    bus: Bus, other: Bus, lease: Lease
) -> None:
    issue(bus, lease, 2)
    entries = bus.streams.read("generate", 2)
    rows = other.streams.pending_rows("generate")
    assert [(row.consumer, row.deliveries) for row in rows] == [("tester", 1), ("tester", 1)]
    assert other.streams.claim("generate", rows, min_idle_s=60) == []

    claimed = other.streams.claim("generate", rows[:1])

    assert [(entry.number, entry.deliveries) for entry in claimed] == [(1, 2)]
    assert bus.streams.renew("generate", [entry.id for entry in entries]) == 1, (
        "the first is no longer mine"
    )


def test_what_is_given_back_counts_as_never_taken(bus: Bus, other: Bus, lease: Lease) -> None:
    issue(bus, lease, 2)
    ids = [entry.id for entry in bus.streams.read("generate", 2)]
    other.streams.claim("generate", other.streams.pending_rows("generate")[:1])

    assert bus.streams.give_back("generate", ids) == 1, "the other is somebody else's"

    row = other.streams.pending_rows("generate", min_idle_s=3600)[0]
    assert (row.id, row.deliveries) == (ids[1], 0)
    assert bus.streams.retire("generate")
    assert not other.streams.retire("generate"), "a consumer with pending entries is kept"


def test_only_consumers_without_entries_are_buried(bus: Bus, other: Bus, lease: Lease) -> None:
    issue(bus, lease, 2)
    assert len(other.streams.read("generate", 1)) == 1
    (mine,) = bus.streams.read("generate", 1)
    bus.streams.move("generate", [Move(mine.id, [])])
    assert bus.streams.forget_dead_consumers("generate", idle_s=-1) == 1
    assert [row.consumer for row in bus.streams.pending_rows("generate")] == ["other"]


def test_entries_that_a_person_deleted_are_forgotten(bus: Bus, lease: Lease) -> None:
    issue(bus, lease, 2)
    first, second = bus.streams.read("generate", 2)
    bus.connection.ask("XDEL", bus.keys.streams["generate"], first.id)
    assert [entry.id for entry in claim_pending(bus, "generate")] == [second.id]
    assert [row.id for row in bus.streams.pending_rows("generate")] == [second.id]


def test_a_stream_that_was_deleted_gets_its_group_again(bus: Bus, lease: Lease) -> None:
    bus.connection.ask("DEL", bus.keys.streams["generate"])
    assert bus.streams.read("generate", 1) == []
    issue(bus, lease, 1)
    assert [entry.number for entry in bus.streams.read("generate", 1)] == [1]


def test_numbers_are_read_beyond_one_page(bus: Bus, lease: Lease) -> None:
    issue(bus, lease, 1201)
    assert bus.state.numbers("generate") == list(range(1, 1202))
    assert bus.state.pending_counts()["generate"] == 0


def test_heartbeats_grow_old(bus: Bus, other: Bus) -> None:
    bus.state.write_heartbeat(
        "score",
        Stats(done=3, detail="waiting for records", numbers={"tokens_per_s": 5.0}),
        in_hand=2,
    )
    (state,) = other.state.workers()
    assert (state.worker, state.stage, state.done, state.in_hand, state.numbers) == (
        "tester",
        "score",
        3,
        2,
        {"tokens_per_s": 5.0},
    )
    assert state.age_s < 5
    assert other.state.workers(max_age_s=-1) == []


def test_dead_letters_over_the_bound_spill_to_a_file(
    bus: Bus, lease: Lease, tmp_path: Path
) -> None:
    issue(bus, lease, 250)
    for entry in bus.streams.read("generate", 250):
        bus.streams.move(
            "generate", [Move(entry.id, [Out("dead", entry.number, b"\xff", "no good")])]
        )
    path = tmp_path / "dead.jsonl"

    assert spill_dead(bus, path, keep=10) == 240
    assert spill_dead(bus, path, keep=10) == 0

    with path.open("ab") as file:
        file.write(
            path.read_bytes().splitlines(keepends=True)[-1]
        )  # a crash wrote a line twice, and tore the next
        file.write(b'{"entry_id"')
    assert spilled_numbers(path) == list(range(1, 241))
    assert bus.state.dead_numbers() == list(range(241, 251))


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("small"), max_memory_mb=64)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def full(small_server: EmbeddedRedis) -> Iterator[Callable[[], object]]:
    """Makes the small server full, until the test ends."""
    with Redis.from_url(small_server.url) as admin:
        yield lambda: admin.config_set("maxmemory", "1mb")
        admin.config_set("maxmemory", "64mb")


def small_bus(server: EmbeddedRedis, run: str, url: str | None = None, timeout_s: float = 5) -> Bus:
    return Bus.connect(
        url or server.url, run, consumer="tester", block_s=0.1, connect_timeout_s=timeout_s
    )


def test_a_full_redis_refuses_tickets_alone(
    small_server: EmbeddedRedis, full: Callable[[], object], run_name: str
) -> None:
    bus = small_bus(small_server, run_name)
    lease = bus.lease.acquire(60)
    issue(bus, lease, 2)
    first, second = bus.streams.read("generate", 2)
    bus.connection.ask("SET", "ballast", b"x" * (1 << 20))
    full()

    assert not bus.lease.issue(lease, 2, [ticket(3)], max_backlog=10)
    assert not bus.lease.reissue(lease, "token", [ticket(1)])
    assert (
        bus.streams.move(
            "generate",
            [
                Move(first.id, [Out("verify", 1, b"y" * 5000)]),
                Move(second.id, [Out("dead", 2, b"", "why")]),
            ],
        )
        == [True] * 2
    )
    bus.lease.announce(lease, PolicyVersion(1, "d", "p", 1))
    bus.state.write_heartbeat("train", Stats())
    bus.lease.renew(lease)
    bus.lease.finish(lease)
    bus.connection.create_groups()

    assert (bus.state.issued(), len(bus.state.workers()), bus.state.finished()) == (2, 1, True)
    bus.connection.ask("CONFIG", "SET", "maxmemory", str(64 << 20))
    assert bus.lease.issue(lease, 2, [ticket(3)], max_backlog=10)
    bus.close()


def test_a_new_run_on_a_full_redis_is_refused(
    small_server: EmbeddedRedis, full: Callable[[], object], run_name: str
) -> None:
    full()
    with pytest.raises(UserError, match="is full"):
        small_bus(small_server, run_name)


def test_a_redis_that_evicts_is_refused(small_server: EmbeddedRedis, run_name: str) -> None:
    admin = small_bus(small_server, run_name)
    admin.connection.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(UserError, match=r"maxmemory-policy allkeys-lru .* expected noeviction"):
        small_bus(small_server, run_name)
    admin.connection.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    admin.close()


def test_a_redis_that_wants_a_password_is_named_without_showing_one(
    small_server: EmbeddedRedis, run_name: str
) -> None:
    admin = small_bus(small_server, run_name)
    admin.connection.ask("CONFIG", "SET", "requirepass", "right")
    try:
        with pytest.raises(UserError, match="refused this login"):
            small_bus(small_server, run_name)
        with pytest.raises(UserError, match="refused this login") as refused:
            small_bus(
                small_server, run_name, url=small_server.url.replace("unix://", "unix://:wrong@")
            )
        assert "wrong@" not in str(refused.value)
        small_bus(
            small_server, run_name, url=small_server.url.replace("unix://", "unix://:right@")
        ).close()
    finally:
        admin.connection.ask("CONFIG", "SET", "requirepass", "")
        admin.close()


def test_a_redis_that_is_down_is_waited_for_and_then_named(run_name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no answer from Redis at unix:.* within 0\.3 s") as down:
        Bus.connect(
            f"unix://{tmp_path}/none.sock",
            run_name,
            consumer="tester",
            block_s=0.1,
            connect_timeout_s=0.3,
        )
    assert down.value.exit == Exit.UNREACHABLE


def test_a_url_that_is_none_is_refused(run_name: str) -> None:
    with pytest.raises(UserError, match=r"redis.url = localhost:6379"):
        Bus.connect(
            "localhost:6379", run_name, consumer="tester", block_s=0.1, connect_timeout_s=0.3
        )
