"""Tells a full disk, and that it has room again. While it is full the run waits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

LEAST_BYTES = 1 << 20
"""With less than this a page of Redis's log or a line of metrics may find no place."""
INTERVAL_S = 1.0


def free_bytes(directory: Path) -> int:
    """The room on the disk that holds `directory`."""
    return shutil.disk_usage(directory).free


class DiskWatch:
    """Watches the disk that holds `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._looked = float("-inf")
        self.full = False

    def news(self) -> Iterator[str]:
        """What has changed since the last look, a sentence each; looks once a second."""
        if time.monotonic() - self._looked < INTERVAL_S:
            return
        self._looked = time.monotonic()
        was_full = self.full
        self.full = free_bytes(self._directory) < LEAST_BYTES
        if self.full and not was_full:
            yield (
                f"the disk of {self._directory} is full: the run waits until there is room. What "
                "is in hand is kept; deaths of workers meanwhile do not count"
            )
        if was_full and not self.full:
            yield f"the disk of {self._directory} has room again: the run goes on"
