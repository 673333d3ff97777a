"""What processes use of the machine: CPU seconds and memory, by /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of a live process, its live descendants, and the children they have waited for.

    0 where /proc does not tell.
    """
    return sum(map(_own_cpu_seconds, family(pid)))


def process_bytes(pid: int) -> int:
    """The memory of a live process and its descendants; what they share counts for each of them."""
    return sum(map(_own_bytes, family(pid)))


def family(pid: int) -> Iterator[int]:
    """A live process and its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _text(children).split():
            yield from family(int(child))


def _own_cpu_seconds(pid: int) -> float:
    # After the name, which may hold anything: utime, stime, and those of children waited for.
    ticks = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _own_bytes(pid: int) -> int:
    pages = _text(Path(f"/proc/{pid}/statm")).split()[1:2]
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def _text(path: Path) -> str:
    """The text of a file of /proc; nothing where its process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""
