"""The audit counts every number once, from the ledger and the streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import StageName, Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.run_files.ledger import Ledger, Settled
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.workers.inspection.audit import DROPPED, audit, counted
from tests.entries import claim_pending


def issue(bus: Bus, count: int) -> None:
    lease = bus.lease.current or bus.lease.acquire(30)
    before = bus.state.issued()
    tickets = [Ticket(before + number, 0, 1, 0, 0, 0, ["train"]) for number in range(1, count + 1)]
    assert bus.lease.issue(lease, before, tickets, 1000)


def move(bus: Bus, stage: StageName, numbers: Sequence[int], *to: str) -> None:
    """Move the entries of `numbers` from `stage` to all of `to`; to nowhere, they are gone."""
    waiting = {
        entry.number: entry
        for entry in [*claim_pending(bus, stage), *bus.streams.read(stage, 1000)]
    }
    moves = []
    for number in numbers:
        outs = [Out(target, number, encode(Tombstone(number, stage, "test"))) for target in to]  # type: ignore[arg-type]
        moves.append(Move(waiting[number].id, outs))
    assert all(bus.streams.move(stage, moves))


def uids(bus: Bus, *numbers: int) -> list[str]:
    return [f"{bus.run}/{number}" for number in numbers]


def test_a_run_that_did_nothing_yet_is_empty(bus: Bus, tmp_path: Path) -> None:
    found = audit(tmp_path, bus)
    assert found["issued"] == found["lost"] == found["duplicated"] == []
    assert counted(found) == {
        "issued": 0,
        "trained": 0,
        "dropped": dict.fromkeys(DROPPED, 0),
        "dead": 0,
        "in_flight": 0,
        "lost": 0,
        "duplicated": 0,
    }


def test_every_number_is_in_exactly_one_set(bus: Bus, tmp_path: Path) -> None:
    issue(bus, 10)
    move(bus, "generate", [1, 2, 3, 4], "verify")
    move(bus, "verify", [1, 2], "train")
    move(bus, "generate", [5], "dead", "train")
    move(bus, "generate", [6])
    move(bus, "generate", [7, 8, 9])
    lines = [
        Settled(1, "trained", 1),
        Settled(7, "trained", 1),
        Settled(8, "stale", 2),
        Settled(9, "not_verified", 2),
    ]
    Ledger(tmp_path / "trained.jsonl").append(lines)
    found = audit(tmp_path, bus)
    assert found == {
        "issued": uids(bus, *range(1, 11)),
        "trained": uids(bus, 1, 7),
        "dropped": {
            "stale": uids(bus, 8),
            "not_verified": uids(bus, 9),
            "group_dead": [],
            "purged": [],
        },
        "dead": uids(bus, 5),
        "in_flight": uids(bus, 2, 3, 4, 10),
        "lost": uids(bus, 6),
        "duplicated": [],
    }
    assert counted(found) == {
        "issued": 10,
        "trained": 2,
        "dropped": {"stale": 1, "not_verified": 1, "group_dead": 0, "purged": 0},
        "dead": 1,
        "in_flight": 4,
        "lost": 1,
        "duplicated": 0,
    }


def test_a_number_trained_twice_or_carried_by_two_entries_is_duplicated(
    bus: Bus, tmp_path: Path
) -> None:
    issue(bus, 4)
    Ledger(tmp_path / "trained.jsonl").append([Settled(1, "trained", 1), Settled(1, "trained", 2)])
    move(bus, "generate", [2], "train", "train")
    move(bus, "generate", [3], "generate", "train")
    found = audit(tmp_path, bus)
    assert found["duplicated"] == uids(bus, 1, 2, 3)
    assert found["trained"] == uids(bus, 1)


def test_a_settled_entry_that_waits_for_its_acknowledgement_is_no_duplicate(
    bus: Bus, tmp_path: Path
) -> None:
    issue(bus, 1)
    move(bus, "generate", [1], "train")
    Ledger(tmp_path / "trained.jsonl").append([Settled(1, "trained", 1)])
    found = audit(tmp_path, bus)
    assert found["trained"] == found["issued"] == uids(bus, 1)
    assert found["in_flight"] == found["duplicated"] == []


def test_a_record_that_moves_while_the_streams_are_read_counts_once(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue(bus, 2)
    read = bus.state.numbers

    def read_then_move(stage: StageName) -> list[int]:
        found = read(stage)
        if stage == "generate" and found:
            move(bus, "generate", found, "verify")
        return found

    monkeypatch.setattr(bus.state, "numbers", read_then_move)
    found = audit(tmp_path, bus)
    assert found["in_flight"] == uids(bus, 1, 2)
    assert (found["lost"], found["duplicated"]) == ([], [])


def test_an_episode_that_goes_back_while_the_streams_are_read_counts_once(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.model_validate({"run": {"name": bus.run}})
    plan = msgspec.structs.replace(make_plan(settings), route=("act", "train"))
    bus.connection.ask("SET", bus.keys.plan, plan.encode())
    issue(bus, 1)
    move(bus, "generate", [1], "act")
    read = bus.state.numbers
    goes_on: list[StageName] = ["generate"]  # after the first look, which misses it there

    def read_then_move(stage: StageName) -> list[int]:
        found = read(stage)
        if stage in goes_on and not found:
            goes_on.clear()
            move(bus, "act", [1], "generate")
        return found

    monkeypatch.setattr(bus.state, "numbers", read_then_move)
    found = audit(tmp_path, bus)
    assert found["in_flight"] == uids(bus, 1)
    assert (found["lost"], found["duplicated"]) == ([], [])


def test_what_is_issued_while_it_reads_belongs_to_the_next_audit(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue(bus, 1)
    before = bus.state.issued()
    issue(bus, 1)
    monkeypatch.setattr(bus.state, "issued", lambda: before)
    assert audit(tmp_path, bus)["issued"] == uids(bus, 1)


def test_a_dead_number_that_was_purged_is_dropped_as_such_and_no_duplicate(
    bus: Bus, tmp_path: Path
) -> None:
    issue(bus, 2)
    move(bus, "generate", [1, 2])
    Ledger(tmp_path / "trained.jsonl").append(
        [Settled(1, "dead", 1), Settled(2, "trained", 1), Settled(1, "purged", 2)]
    )
    found = audit(tmp_path, bus)
    assert found["dropped"]["purged"] == uids(bus, 1)
    assert (found["dead"], found["duplicated"], found["lost"]) == ([], [], [])


def test_what_was_never_issued_is_told_and_settles_nothing(bus: Bus, tmp_path: Path) -> None:
    issue(bus, 2)
    move(bus, "generate", [1], "train")
    for number in (b"7", b"9" * 30, b"9" * 5000, b"odd"):
        bus.connection.ask("XADD", bus.keys.streams["verify"], "*", "n", number, "b", b"")
    Ledger(tmp_path / "trained.jsonl").append([Settled(1, "trained", 1), Settled(5, "trained", 1)])
    found = audit(tmp_path, bus)
    assert found["beyond"] == [
        "the stream of verify has 4 entries of numbers never issued",
        "the ledger has 1 lines of numbers never issued",
    ]
    assert found["trained"] == uids(bus, 1)
    assert (found["lost"], found["duplicated"]) == ([], [])
    assert counted(found)["beyond"] == found["beyond"]


def test_a_ledger_that_says_other_than_the_metrics_is_told(bus: Bus, tmp_path: Path) -> None:
    issue(bus, 3)
    move(bus, "generate", [1, 2, 3])
    lines = [Settled(number, "trained", 1) for number in (1, 2, 3)]
    Ledger(tmp_path / "trained.jsonl").append(lines)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "rollouts": 3}\n{"step": 2, "rollouts": 4}\n')
    assert "beyond" not in audit(tmp_path, bus), "step 2 is in no checkpoint yet"
    metrics.write_text('{"step": 1, "rollouts": 2}\n')
    assert audit(tmp_path, bus)["beyond"] == [
        "the metrics count 2 rollouts trained up to step 1, the ledger 3"
    ]


def test_entries_in_a_stream_that_no_rollout_of_the_run_passes_are_told(
    bus: Bus, tmp_path: Path
) -> None:
    issue(bus, 2)
    move(bus, "generate", [1], "verify")
    move(bus, "generate", [2], "score")
    assert "beyond" not in audit(tmp_path, bus)
    bus.connection.ask("SET", bus.keys.plan, b'{"route":["verify","train"]}')
    assert audit(tmp_path, bus)["beyond"] == [
        "the stream of score has 1 entries, and rollouts of this run pass generate → verify → train"
    ]
