"""What the launcher knows of a run: the state of its streams, seen by a thread of its own, and the
tail of its metrics.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
from redis.exceptions import RedisError

from onstream.pipeline.records import PolicyVersion, RecordError, StageName
from onstream.settings.stages import KINDS_OF, WORK_STAGES
from onstream.workers.launcher.polling import Polling

RECENT_STEPS = 10
NEXT_WEIGHTS = (
    "waits for policy version"  # the rhythm of a run, and nothing that keeps it from going on
)
SILENT_S = 5.0  # a worker that beats every second and was not heard of for so long is gone


class Heartbeat(Protocol):
    """What is read of a worker's heartbeat."""

    @property
    def stage(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def detail(self) -> str: ...


class Reads(Protocol):
    """What the launcher asks of the bus."""

    def ready_stages(self) -> set[StageName]: ...
    def finished(self) -> bool: ...
    def newest_policy(self) -> PolicyVersion | None: ...
    def backlog(self) -> dict[StageName, int]: ...
    def pending_counts(self) -> dict[StageName, int]: ...
    def workers(self, max_age_s: float = 10.0) -> Sequence[Heartbeat]: ...


@dataclass(frozen=True)
class Snapshot:
    """The streams of a run at `taken` (monotonic seconds). `unreachable` says why it is older than
    it should be.
    """

    taken: float = 0.0
    ready: frozenset[str] = frozenset()
    finished: bool = False
    version: int = 0  # of the newest policy
    backlog: Mapping[str, int] = field(default_factory=dict)
    in_hand: Mapping[str, int] = field(
        default_factory=dict
    )  # the part of the backlog that workers hold
    workers: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # stage -> what each live worker of it says it does
    taking: frozenset[str] = frozenset()  # stages with a worker that is done with starting
    unreachable: str = ""


class Watcher:
    """Takes a snapshot of `bus` every `interval_s`, in a thread: a Redis that hangs must not stop
    the supervision of the workers.

    Consumes nothing; waits for replies and its interval; is unblocked by `stop`; produces `latest`.
    """

    def __init__(self, bus: Reads, interval_s: float) -> None:
        self.latest = Snapshot()
        self._bus = bus
        self._polling = Polling("watcher", interval_s, self._look)

    def start(self) -> None:
        """Start the thread."""
        self._polling.start()

    def stop(self) -> None:
        """End the thread, so that its bus may be closed; one that hangs with its Redis is left
        behind.
        """
        self._polling.stop()

    def finished(self, since: float) -> bool | None:
        """Whether the run was over at some time after `since` (monotonic seconds); None while there
        is no later snapshot.
        """
        return self.latest.finished if self.latest.taken > since else None

    def _look(self) -> None:
        try:
            self.latest = take(self._bus)
        except (RedisError, RecordError, OSError) as error:
            self.latest = replace(
                self.latest, unreachable=f"the run's state cannot be read from Redis ({error})"
            )


def take(bus: Reads) -> Snapshot:
    """A snapshot of the run now. It counts as of the moment when the first question was asked."""
    taken = time.monotonic()
    workers: dict[str, list[str]] = {}
    beats = bus.workers(max_age_s=SILENT_S)
    for beat in beats:
        workers.setdefault(beat.stage, []).append(beat.detail)
    return Snapshot(
        taken=taken,
        ready=frozenset(bus.ready_stages()),
        finished=bus.finished(),
        version=policy.number if (policy := bus.newest_policy()) else 0,
        backlog={str(stage): count for stage, count in bus.backlog().items()},
        in_hand={str(stage): count for stage, count in bus.pending_counts().items()},
        workers=workers,
        taking=frozenset(beat.stage for beat in beats if beat.state != "starting"),
    )


def waits(
    snapshot: Snapshot,
    stages: Sequence[StageName],
    started: Mapping[StageName, int],
    kinds: Mapping[StageName, Sequence[str]] = KINDS_OF,
) -> list[str]:
    """What the run waits for, a sentence each. `started` counts the workers that the launcher
    itself runs, by stage.

    `kinds` are the workers that serve each stage; by default all that can.

    >>> waits(Snapshot(ready=frozenset({"verify"}), backlog={"verify": 7}), ["verify"], {})
    ['verify: 7 records wait and no worker takes them; start one with `onstream worker verifier`']
    """
    if snapshot.unreachable:
        return [snapshot.unreachable]
    found: dict[str, list[str]] = {}
    for stage in stages:
        if why := _wait(snapshot, stage, started.get(stage, 0), kinds[stage]):
            found.setdefault(why, []).append(stage)
    return [f"{', '.join(together)}: {why}" for why, together in found.items()]


def _wait(snapshot: Snapshot, stage: str, started: int, kinds: Sequence[str]) -> str:
    """Why `stage` keeps the run waiting; nothing if it does not."""
    present = snapshot.workers.get(stage, ())
    backlog = snapshot.backlog.get(stage, 0)
    commands = " or ".join(f"`onstream worker {kind}`" for kind in kinds)
    remedy = "one is starting" if started or present else f"start one with {commands}"
    if stage not in snapshot.taking and backlog:
        return f"{backlog} records wait and no worker takes them; {remedy}"
    detail = next((detail for detail in present if detail), "")
    if stage in snapshot.ready:
        held_up = (
            stage in WORK_STAGES
            and backlog
            and all(present)
            and not detail.startswith(NEXT_WEIGHTS)
        )
        return detail if held_up else ""
    return f"not ready: {detail or ('starting' if started or present else f'no worker; {remedy}')}"


class MetricsTail:
    """The newest rows of a run's `metrics.jsonl`, read as they are appended. A file that shrank was
    cut back by a resume.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.rows: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)

    @property
    def step(self) -> int:
        """The newest step, 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step over the last ten; None before the first. Time between an interruption
        and its resume is in none.
        """
        return self._elapsed_s / len(self.rows) if self.rows else None

    @property
    def rollouts_per_s(self) -> float | None:
        """Rollouts trained per second over the last ten steps; None before the first."""
        return (
            sum(int(row["rollouts"]) for row in self.rows) / self._elapsed_s if self.rows else None
        )

    def stepped_since(self, time_s: float) -> bool:
        """Whether a step was taken after `time_s`, in seconds since the epoch."""
        return bool(self.rows) and float(self.rows[-1]["time"]) > time_s

    @property
    def _elapsed_s(self) -> float:
        return sum(float(row["elapsed_s"]) for row in self.rows)

    def read(self) -> None:
        """Take in what was appended since the last call."""
        if not self._path.exists():
            return
        if self._path.stat().st_size < self._offset:
            self._offset = 0
            self.rows.clear()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self.rows.extend(msgspec.json.decode(line) for line in whole.split(b"\n") if line)
