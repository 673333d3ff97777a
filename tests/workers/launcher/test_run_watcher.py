"""What the launcher knows of a run: snapshots that a thread takes, and the tail of the metrics."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from redis.exceptions import ConnectionError

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files.json_lines import GrowingRows
from onstream.workers.inspection.run_snapshot import waits
from onstream.workers.launcher.run_watcher import MetricsTail, RunWatcher
from tests.waiting import LONGEST_S

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


def test_a_file_that_has_grown_again_since_it_was_cut_is_told_from_one_that_only_grew(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = GrowingRows(path)
    write(path, 1, 2)
    assert [row["step"] for row in file.read()[1]] == [1, 2]
    write(path, 3)
    assert file.read() == (False, [{"step": 3, "time": 106.0, "rollouts": 64, "elapsed_s": 2.0}])
    write(path, 1, 2, 11, 12, mode="w")
    void, rows = file.read()
    assert void
    assert [row["step"] for row in rows] == [1, 2, 11, 12]
    assert file.read() == (False, [])


def test_the_end_of_a_run_is_known_only_from_what_was_seen_later(bus: Bus) -> None:
    watcher = RunWatcher(bus.state, interval_s=0.01)
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
    watcher = RunWatcher(bus, interval_s=0.01)  # type: ignore[arg-type]
    watcher.start()
    assert bus.asked_again.wait(LONGEST_S)
    watcher.stop()
    assert waits(watcher.latest, STAGES, {}) == [
        "the run's state cannot be read from Redis (connection refused)"
    ]
