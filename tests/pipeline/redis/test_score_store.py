from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from onstream.pipeline.redis import score_store
from onstream.pipeline.redis.bus import Bus
from onstream.workers.launcher.embedded_redis import EmbeddedRedis


def some(count: int) -> list[tuple[bytes, bytes]]:
    return [(uuid.uuid4().bytes, b"%d" % number) for number in range(count)]


@pytest.fixture(autouse=True)
def empty(bus: Bus) -> None:
    bus.scores.keep([(b"any", b"thing")], 0)


def test_scores_that_were_kept_are_found(bus: Bus) -> None:
    pairs = some(3)
    bus.scores.keep(pairs, 10)
    bus.scores.keep(pairs, 10)  # as a repeated call would
    assert bus.scores.recall([pairs[2][0], b"unknown", pairs[0][0]]) == [b"2", None, b"0"]
    assert bus.scores.recall([]) == []


def test_the_least_recently_used_go_first(bus: Bus) -> None:
    pairs = some(4)
    bus.scores.keep(pairs[:3], 3)
    bus.scores.recall([pairs[0][0]])
    bus.scores.keep(pairs[3:], 3)
    assert bus.scores.recall([digest for digest, _ in pairs]) == [b"0", None, b"2", b"3"]


def test_their_bytes_are_bounded_too(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_store, "KEPT_BYTES", 250)
    pairs = [(digest, value * 100) for digest, value in some(4)]
    bus.scores.keep(pairs, 100)
    assert [value is not None for value in bus.scores.recall([digest for digest, _ in pairs])] == [
        False,
        False,
        True,
        True,
    ]


def test_what_every_worker_of_a_stage_has_spent_is_added_up(bus: Bus) -> None:
    assert bus.scores.report_spent_tokens("score", 10) == 10
    assert bus.scores.report_spent_tokens("score", 25) == 25
    assert bus.scores.report_spent_tokens("score", 10) == 25, "a total never falls"
    assert bus.scores.own_spent_tokens("score") == 25
    bus.connection.consumer = "another"
    assert (bus.scores.own_spent_tokens("score"), bus.scores.report_spent_tokens("score", 5)) == (
        0,
        30,
    )
    assert (
        bus.scores.own_spent_tokens("generate"),
        bus.scores.report_spent_tokens("generate", 7),
    ) == (0, 7)


def test_a_teacher_is_remembered_by_what_it_was_probed_with(bus: Bus) -> None:
    name = uuid.uuid4().bytes
    assert bus.scores.teacher_check(name) is None
    bus.scores.note_teacher_check(name, b"first")
    assert bus.scores.teacher_check(name) == b"first"


def test_on_a_full_redis_teachers_go_on_with_what_was_kept(tmp_path: Path, run_name: str) -> None:
    server = EmbeddedRedis(tmp_path, max_memory_mb=64)
    bus = Bus.connect(server.start(), run_name, consumer="tester", block_s=0.2, connect_timeout_s=5)
    ((digest, value),) = some(1)
    bus.scores.keep([(digest, value)], 10)
    bus.scores.report_spent_tokens("score", 10)
    bus.connection.ask("CONFIG", "SET", "maxmemory", 1)
    bus.scores.keep(some(1), 10)
    bus.scores.note_teacher_check(b"teacher", b"first")
    assert bus.scores.recall([digest, b"unknown"]) == [value, None]
    assert bus.scores.report_spent_tokens("score", 25) == bus.scores.own_spent_tokens("score") == 25
    assert bus.scores.teacher_check(b"teacher") is None
    bus.close()
    server.stop()
