"""Processes: their cores and memory, is one gone, kill a whole group, hear a request to stop."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Parameters of mallopt(3) by their numbers.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
KEPT_BYTES = 1 << 30
"""How much freed memory at the end of the heap a process keeps at most."""
LARGEST_KEPT_BYTES = 32 << 20
"""Of one block; glibc allows no more."""


def usable_cores() -> int:
    """How many cores this process may use; on macOS, without affinity, all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_gone(pid: int) -> bool:
    """Whether no process of this machine has `pid`. One that has ended and that nobody has waited
    for is still there.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, as somebody else's
        return False
    return False


def kill_group(pid: int) -> None:
    """Kill the process group that `pid` leads, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):  # no group yet, or all of it is gone
        os.killpg(pid, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees for what it allocates next.

    The tensors of a step are a few megabytes each, and all are freed at its end. glibc then gives
    their pages back to the system, which clears each of them anew in the next step. With another C
    library nothing changes.
    """
    import ctypes  # costs a start of other processes more than all the rest here

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


class StopSignals:
    """Takes SIGTERM and SIGINT, while it is entered, as requests to stop; for the main thread.

    `on_request` is called within the signal handler, after the request was counted. It may raise;
    it must not take a lock that the interrupted code may hold.
    """

    def __init__(self, on_request: Callable[[], None] | None = None) -> None:
        self._on_request = on_request
        self._times: list[float] = []
        # the put of a SimpleQueue, unlike the set of an Event, is safe in a signal handler
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def requests(self) -> int:
        """How many there were."""
        return len(self._times)

    @property
    def since_first_s(self) -> float:
        """Seconds from the first request to the last one; 0 before a second one."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for a request. True if there was one, now or before."""
        if not self._times:
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=timeout_s)
        return bool(self._times)

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._times.append(time.monotonic())
        self._wakes.put(None)
        if self._on_request is not None:
            self._on_request()
