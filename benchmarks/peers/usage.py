"""CPU seconds and memory of a process and of all that it starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

INTERVAL_S = 0.5


@dataclass
class Usage:
    """What a process and its descendants have used, at one moment after another."""

    times: list[float] = field(default_factory=list)
    """Seconds since 1970."""
    cpu_s: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)

    def cpu_between(self, start: float, end: float) -> float:
        """CPU seconds between two moments, in a straight line between the two looks beside each."""
        first, last = np.interp([start, end], self.times, self.cpu_s)
        return float(last - first)

    @property
    def peak_bytes(self) -> int:
        """The most resident memory of all processes together; shared pages count in each."""
        return max(self.rss_bytes)


class UsageWatch:
    """Looks at a process and its descendants every half second, from a thread, until stopped."""

    def __init__(self, pid: int) -> None:
        self.usage = Usage()
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage-watch", daemon=True)
        self._thread.start()

    def stop(self) -> Usage:
        self._stopped.set()
        self._thread.join()
        return self.usage

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self._look(processes)
            self._stopped.wait(INTERVAL_S)

    def _look(self, processes: Sequence[psutil.Process]) -> None:
        cpu_s = 0.0
        rss_bytes = 0
        for process in processes:
            try:
                cpu_s += cpu_seconds(process)
                rss_bytes += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        # A process that ends between two looks is in its parent's sum a moment later.
        self.usage.cpu_s.append(max([cpu_s, *self.usage.cpu_s[-1:]]))
        self.usage.rss_bytes.append(rss_bytes)
        self.usage.times.append(time.time())


def cpu_seconds(process: psutil.Process) -> float:
    """Its CPU seconds, and those of the children that it has waited for."""
    times = process.cpu_times()
    own = times.user + times.system
    return own + times.children_user + times.children_system
