"""The descendants of a process: found, killed and reaped, whatever sessions and groups they are in.

A subreaper inherits the orphans among its descendants. So a daemon that a job has started stays
below the jobs worker. Linux only; elsewhere the job's process group has to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
_PAUSE_S = 0.01


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> set[int]:
    """The living processes below `pid`."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found: set[int] = set()
    unvisited = [pid]
    while unvisited:
        new = children.get(unvisited.pop(), [])
        found.update(new)
        unvisited += new
    return found


def kill_below(pid: int, *, within_s: float = 5.0) -> bool:
    """Kill every process below `pid`, and what they start meanwhile. False if some live on."""
    deadline = time.monotonic() + within_s
    while living := descendants(pid):
        for each in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True


def reap() -> None:
    """Wait for every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
