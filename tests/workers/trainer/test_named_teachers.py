"""Several teachers in one run: whose a rollout is, and what happens while one is away."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.records import Rollout, Ticket, Timing
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import NotForThisStage, Stats, delivery_of
from onstream.settings.plan import Plan
from onstream.workers.inspection.status import status
from onstream.workers.trainer import teachers
from tests.workers.trainer.driver import Run, rollout

NAMED: dict[str, Any] = {
    "teachers__math__local__model__name": "mathematician",
    "teachers__code__local__model__name": "programmer",
    "trainer__loss__teacher_tau": 1.0,
    "eval__samples": 0,
}
STREAMS = ("score:math", "score:code")


@pytest.fixture
def started(run: Callable[..., Run], bus: Bus) -> Callable[..., Run]:
    """Starts a run whose stages are ready, with the teachers `math` and `code`."""

    def start(**changes: Any) -> Run:
        bus.keys.add_teachers(("math", "code"))
        bus.connection.create_groups()
        job = run(**NAMED, **changes)
        job.ready()
        for stream in STREAMS:
            bus.state.mark_ready(stream)
        return job

    return start


def write(job: Run) -> list[Ticket]:
    """Have each ticket written, and the rollout moved to the stream of its teacher."""
    policy = job.bus.state.newest_policy()
    assert policy is not None
    asked = []
    for entry, ticket in job.tickets():
        record = rollout(ticket, policy.number, route=ticket.route[1:])
        move = Move(entry.id, [Out(record.route[0], ticket.number, encode(record))])
        job.bus.streams.move("generate", [move])
        asked.append(ticket)
    return asked


def score(job: Run, stream: str) -> int:
    """Have the teacher of `stream` score all that waits for it; returns how many."""
    entries = job.bus.streams.read(stream, 10_000)
    for entry in entries:
        record = delivery_of(entry, stream, job.bus.limits).rollout
        record.route = ["train"]
        record.timings = [*record.timings, Timing(stream, "t", 10, 11)]
        job.bus.streams.move(stream, [Move(entry.id, [Out("train", entry.number, encode(record))])])
    return len(entries)


def present(bus: Bus, *streams: str) -> None:
    """Only the workers of `streams` are there: each is heard of under a name of its own."""
    me = bus.connection.consumer
    for stream in STREAMS:
        bus.connection.consumer = f"worker-of-{stream}"
        bus.state.remove_heartbeat()
        if stream in streams:
            bus.state.write_heartbeat(stream, Stats())
    bus.connection.consumer = me


def rows(path: Path, *teachers: str | None) -> str:
    """A file of problems, each with the teacher that it names, if any."""
    problems = [
        {"prompt": f"say {number}", "answer": "it"} | ({"teacher": name} if name else {})
        for number, name in enumerate(teachers)
    ]
    path.write_text("\n".join(map(json.dumps, problems)))
    return str(path)


def test_no_ticket_is_issued_before_every_teacher_has_been_ready(
    run: Callable[..., Run], bus: Bus
) -> None:
    bus.keys.add_teachers(("math", "code"))
    job = run(**NAMED)
    job.ready()
    bus.state.mark_ready("score:math")
    job.turn()
    assert job.trainer.stats.detail == "waits for score:code: not ready yet"
    assert bus.state.issued() == 0


def test_the_rows_field_says_whose_stream_a_rollout_passes(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    problems = rows(tmp_path / "rows.jsonl", *["math"] * 6, *["code"] * 2)
    job = started(task__name="jsonl", task__path=problems)
    job.turn()
    tickets = write(job)
    streams = {stream: set(job.bus.state.numbers(stream)) for stream in STREAMS}
    for ticket in tickets:
        assert ticket.route[::2] == ["verify", "train"]
        assert ticket.number in streams[ticket.route[1]]
    groups = Counter((ticket.group, ticket.route[1]) for ticket in tickets)
    assert set(groups.values()) == {4}, "a group has one teacher"


def test_a_row_without_a_teacher_is_shared_out_and_an_unknown_name_refused_with_the_known(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    job = started(
        task__name="jsonl",
        task__path=rows(tmp_path / "rows.jsonl", *[None] * 8),
        teachers__math__weight=0.0,
    )
    job.turn()
    assert {ticket.route[1] for ticket in write(job)} == {"score:code"}
    with pytest.raises(UserError, match=r"`teacher` is 'maths'; expected one of math, code"):
        job.start(task__path=rows(tmp_path / "wrong.jsonl", "math", "maths"))


def test_a_rollout_of_one_teacher_is_none_for_the_workers_of_another(
    started: Callable[..., Run], bus: Bus
) -> None:
    job = started()
    job.turn()
    number = next(t.number for t in write(job) if t.route[1] == "score:math")
    entry = next(e for e in bus.streams.read("score:math", 1000) if e.number == number)
    with pytest.raises(NotForThisStage, match="at score:code whose route goes on with score:math"):
        delivery_of(entry, "score:code", bus.limits)
    record = decode_work(entry.payload)
    assert isinstance(record, Rollout)
    record.route = ["score:history", "train"]
    foreign = type(entry)(entry.id, entry.number, encode(record), 1)
    with pytest.raises(NotForThisStage, match=r"score:math → score:code → train"):
        delivery_of(foreign, "score:history", bus.limits)


def test_while_one_teacher_is_away_its_rollouts_wait_and_those_of_the_other_train(
    started: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "LOOK_S", 0.0)
    job = started(trainer__max_steps=12)
    present(bus, *STREAMS)
    job.turn()
    write(job)
    present(bus, "score:code")
    while job.trainer.step < 8:
        job.turn()
        write(job)
        score(job, "score:code")
        present(bus, "score:code")
    trained = {row["step"]: set(row["teachers"]) for row in job.rows()}
    assert all(names == {"code"} for names in trained.values())
    parked = len(bus.state.numbers("score:math"))
    window = 2 * 8
    assert window <= parked <= 2 * window, "what was on its way when the window's worth was there"
    found = status(bus)
    assert found["stages"]["score:math"]["backlog"] == parked
    assert any("onstream worker teacher --name math" in sentence for sentence in found["waits"])
    counts = job.counts()
    assert counts.get("lost") is counts.get("duplicated") is None and counts["dropped"] > 0

    present(bus, *STREAMS)
    while not bus.state.finished():
        write(job)
        for stream in STREAMS:
            score(job, stream)
        present(bus, *STREAMS)
        job.turn()
    assert any("math" in row["teachers"] for row in job.rows()), "it trains again"
    assert set(job.counts()) <= {"issued", "trained", "dropped", "in_flight"}


def test_where_all_teachers_are_away_nothing_is_passed_over(
    started: Callable[..., Run], bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "LOOK_S", 0.0)
    job = started()
    present(bus)
    for _ in range(10):
        job.turn()
        write(job)
    assert (bus.state.issued(), job.counts()) == (16, {"issued": 16, "in_flight": 16})


def test_a_killed_trainer_gives_each_problem_the_teacher_that_it_had(
    started: Callable[..., Run], bus: Bus
) -> None:
    job = started()
    job.turn()
    planner = job.trainer.tickets.planner
    before = {number: planner.ticket(number, 0).route for number in range(1, 99)}
    assert {tuple(route) for route in before.values()} == {
        ("verify", stream, "train") for stream in STREAMS
    }
    again = job.start(run__resume="auto").tickets.planner
    assert before == {number: again.ticket(number, 0).route for number in range(1, 99)}
    plan = Plan.decode(bus.state.plan() or b"")
    assert plan.streams == ("generate", "verify", *STREAMS, "train")
