"""What the launcher knows: the tail of the metrics, the streams' state, and what a run waits for."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from onstream.pipeline.records import PolicyVersion, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.workers.launcher.run_watcher import MetricsTail, Snapshot, Watcher, take, waits

STAGES = ("generate", "verify", "train")


def write(path: Path, *steps: int, mode: str = "a") -> None:
    with path.open(mode) as file:
        for step in steps:
            file.write(
                json.dumps(
                    {"step": step, "time": 100.0 + 2 * step, "rollouts": 64, "elapsed_s": 2.0}
                )
                + "\n"
            )


def test_a_row_counts_when_its_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.read()
    assert (tail.step, tail.step_seconds, tail.rollouts_per_s) == (0, None, None)
    with path.open("a") as file:
        file.write('{"step": 1, "time": 5')
        file.flush()
        tail.read()
        assert tail.step == 0
        file.write('.0, "rollouts": 8}\n')
    tail.read()
    assert tail.rows[-1] == {"step": 1, "time": 5.0, "rollouts": 8}


def test_rates_are_over_the_last_ten_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    write(path, 1)
    tail.read()
    assert (tail.step_seconds, tail.rollouts_per_s) == (2.0, 32.0)
    with path.open("a") as file:
        file.write('{"step": 2, "time": 104.0, "rollouts": 128, "elapsed_s": 4.0}\n')
    tail.read()
    assert (tail.step_seconds, tail.rollouts_per_s) == (3.0, 32.0)
    assert tail.stepped_since(103.9)
    assert not tail.stepped_since(104.0)
    write(path, *range(3, 31))
    tail.read()
    assert [row["step"] for row in tail.rows] == list(range(21, 31))
    assert tail.step_seconds == 2.0


def test_a_file_that_a_resume_cut_back_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    write(path, *range(1, 8))
    tail.read()
    write(path, 1, 2, mode="w")
    tail.read()
    assert [row["step"] for row in tail.rows] == [1, 2]


def test_a_snapshot_holds_what_redis_says(bus: Bus) -> None:
    lease = bus.lease.acquire(5)
    ticket = Ticket(
        number=1, group=0, group_size=1, index=0, seed=0, min_policy_version=0, route=["train"]
    )
    bus.lease.issue(lease, 0, [ticket], 100)
    bus.lease.announce(
        lease, PolicyVersion(number=3, digest="d", path="policies/000003", size_bytes=1)
    )
    bus.state.mark_ready("generate")
    bus.state.write_heartbeat("generate", Stats(detail="loading the weights"), state="starting")
    snapshot = take(bus.state)
    assert snapshot.ready == {"generate"}
    assert snapshot.backlog == {"generate": 1, "verify": 0, "score": 0, "train": 0}
    assert snapshot.version == 3
    assert snapshot.in_hand == {"generate": 0, "verify": 0, "score": 0, "train": 0}
    assert snapshot.workers == {"generate": ["loading the weights"]}
    assert snapshot.taking == frozenset()
    assert not snapshot.finished


def test_the_end_of_a_run_is_known_only_from_what_was_seen_later(bus: Bus) -> None:
    watcher = Watcher(bus.state, interval_s=0.01)
    assert watcher.finished(time.monotonic()) is None
    bus.lease.finish(bus.lease.acquire(5))
    watcher.start()
    since = time.monotonic()
    while watcher.finished(since) is None:
        time.sleep(0.005)
    watcher.stop()
    assert watcher.finished(since) is True


class Away:
    """A bus whose Redis went away, which a shared real server cannot do; says when it was asked for
    the second time.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.asked_again = threading.Event()

    def workers(self, max_age_s: float = 10.0) -> list[Any]:
        self.calls += 1
        if self.calls > 1:
            self.asked_again.set()
        raise ConnectionError("connection refused")

    ready_stages = finished = newest_policy = backlog = pending_counts = workers


def test_a_redis_that_is_away_is_said_and_asked_again() -> None:
    bus = Away()
    watcher = Watcher(bus, interval_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    assert bus.asked_again.wait(5)
    watcher.stop()
    assert waits(watcher.latest, STAGES, {}) == [
        "the run's state cannot be read from Redis (connection refused)"
    ]


ALL = frozenset(STAGES)


def held_up(details: list[str], backlog: int = 9) -> Snapshot:
    """A run whose workers of one stage say `details`."""
    return Snapshot(ready=ALL, taking=ALL, workers={"verify": details}, backlog={"verify": backlog})


@pytest.mark.parametrize(
    ("snapshot", "started", "expected"),
    [
        (
            Snapshot(
                ready=ALL,
                taking=ALL,
                workers={stage: [""] for stage in STAGES},
                backlog={"verify": 900},
            ),
            {},
            [],
        ),
        (
            Snapshot(ready=ALL, workers={"generate": [""], "train": [""]}, backlog={"verify": 900}),
            {},
            [
                "verify: 900 records wait and no worker takes them; start one with `onstream worker verifier`"
            ],
        ),
        (
            Snapshot(
                ready=ALL,
                taking=ALL - {"verify"},
                workers={"verify": ["loading"]},
                backlog={"verify": 900},
            ),
            {"verify": 1},
            ["verify: 900 records wait and no worker takes them; one is starting"],
        ),
        (
            Snapshot(ready=frozenset({"generate"}), workers={"train": ["loading the optimizer"]}),
            {"train": 1},
            [
                "verify: not ready: no worker; start one with `onstream worker verifier`",
                "train: not ready: loading the optimizer",
            ],
        ),
        (
            Snapshot(ready=frozenset({"generate", "train"})),
            {"verify": 2},
            ["verify: not ready: starting"],
        ),
        (
            Snapshot(),
            {"generate": 1, "verify": 1, "train": 1},
            ["generate, verify, train: not ready: starting"],
        ),
        (
            held_up(["waiting for the teacher: http://t/v1: ConnectError"]),
            {},
            ["verify: waiting for the teacher: http://t/v1: ConnectError"],
        ),
        (held_up(["waiting for the teacher", ""]), {}, []),
        (held_up(["waits for policy version 3; 2 is the newest announced"]), {}, []),
        (held_up(["waiting for the teacher"], backlog=0), {}, []),
    ],
)
def test_what_a_run_waits_for_is_named(
    snapshot: Snapshot, started: dict[str, int], expected: list[str]
) -> None:
    assert waits(snapshot, STAGES, started) == expected
