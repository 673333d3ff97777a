"""What the launcher knows of a run: snapshots of its state, and the tail of its metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from onstream.pipeline.redis.run_end import RunEnd
from onstream.pipeline.redis.run_state import RunState
from onstream.pipeline.run_files.json_lines import GrowingRows
from onstream.workers.inspection.run_snapshot import RunSnapshot, take_snapshot
from onstream.workers.launcher.metric_rows import waited_for
from onstream.workers.launcher.polling import PollingThread

RECENT_STEPS = 10


class RunWatcher:
    """Takes a snapshot of the run's `state` every `interval_s`, in a thread.

    The run ends after `max_steps`; an earlier end that was there already does not count.

    In a thread because a Redis that hangs must not stop the supervision of the workers.

    Consumes nothing; waits for replies and its interval; is unblocked by `stop`; produces `latest`.
    """

    def __init__(self, state: RunState, interval_s: float, max_steps: int = 0) -> None:
        self.latest = RunSnapshot()
        self._state = state
        self._run_end = RunEnd(state, max_steps)
        self._polling = PollingThread("watcher", interval_s, self._look)

    def start(self) -> None:
        """Start the thread."""
        self._polling.start()

    def stop(self) -> None:
        """End the thread, so that its bus may be closed. One that hangs is left behind."""
        self._polling.stop()

    def finished(self, since: float) -> bool | None:
        """Whether the run was over at some time after `since` (monotonic seconds).

        None while there is no later snapshot.
        """
        return self.latest.finished if self.latest.taken > since else None

    def _look(self) -> None:
        try:
            self.latest = take_snapshot(self._state, self._run_end)
        except (RedisError, OSError) as error:
            self.latest = replace(
                self.latest, unreachable=f"the run's state cannot be read from Redis ({error})"
            )


class MetricsTail:
    """The newest rows of a run's `metrics.jsonl`, read as they are appended."""

    def __init__(self, path: Path) -> None:
        self._file = GrowingRows(path)
        self.rows: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)

    @property
    def step(self) -> int:
        """The newest step, 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step over the last ten; None before the first.

        The time between an interruption and the resume does not count.
        """
        return self._elapsed_s / len(self.rows) if self.rows else None

    @property
    def rollouts_per_s(self) -> float | None:
        """Rollouts trained per second over the last ten steps; None before the first."""
        return (
            sum(int(row["rollouts"]) for row in self.rows) / self._elapsed_s if self.rows else None
        )

    @property
    def waited_for(self) -> dict[str, float]:
        """The share of the last ten steps that the trainer waited for each stage."""
        return waited_for(self.rows, self._elapsed_s)

    def stepped_since(self, time_s: float) -> bool:
        """Whether a step was taken after `time_s`, in seconds since the epoch."""
        return bool(self.rows) and float(self.rows[-1]["time"]) > time_s

    @property
    def _elapsed_s(self) -> float:
        return sum(float(row["elapsed_s"]) for row in self.rows)

    def read(self) -> None:
        """Take in what was appended since the last call."""
        void, rows = self._file.read()
        if void:  # a resume has cut the file back
            self.rows.clear()
        self.rows.extend(rows)
