"""Writes the journal, and waits for a disk that is full."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from onstream.pipeline.run_files.recording import Frame, Recorder, RecordFrame
from onstream.pipeline.telemetry import get_logger
from onstream.workers.trainer.durability.run_directory import (
    FAILURES_ALLOWED,
    disk_error,
    retry_after_s,
)

log = get_logger()


class JournalWriter:
    """Appends frames to a journal in their order. What a full disk refuses waits in memory."""

    def __init__(self, recorder: Recorder, run_dir: Path) -> None:
        self._recorder = recorder
        self._run_dir = run_dir
        self._waiting: deque[Frame] = deque()
        self._failures = 0
        self._retry_at = 0.0

    @property
    def stalled(self) -> bool:
        """Whether frames wait for room on the disk."""
        return self._failures > 0

    def add(self, frame: Frame) -> None:
        """Put `frame` behind those that wait; `write` writes it."""
        self._waiting.append(frame)

    def write(self) -> list[tuple[int, int, int]]:
        """Write what waits: the number, begin and end of each record that was written.

        Raises:
            UserError: it failed many times in a row.
        """
        written: list[tuple[int, int, int]] = []
        if time.monotonic() < self._retry_at:
            return written
        try:
            while self._waiting:
                begin = self._recorder.position
                self._append(self._waiting[0])
                frame = self._waiting.popleft()
                if isinstance(frame, RecordFrame):
                    written.append((frame.number, begin, self._recorder.position))
        except OSError as error:
            self._failed(error)
        else:
            self._failures = 0
            self._retry_at = 0.0
        return written

    def _append(self, frame: Frame) -> None:
        if isinstance(frame, RecordFrame):
            self._recorder.record(frame.number, frame.taken, frame.payload)
        else:
            self._recorder.mark(frame, time.time())

    def _failed(self, error: OSError) -> None:
        self._failures += 1
        if self._failures >= FAILURES_ALLOWED:
            raise disk_error(self._run_dir, error) from error
        pause_s = retry_after_s(self._failures)
        log.error(
            "the run's journal could not be written; training waits",
            problem=str(error),
            failures=self._failures,
            allowed=FAILURES_ALLOWED,
            retry_in_s=pause_s,
        )
        self._retry_at = time.monotonic() + pause_s
