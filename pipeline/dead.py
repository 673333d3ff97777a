"""Dead letters beyond the bound of what Redis keeps go to a file of the run. None is ever trimmed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pipeline.board import DeadLetter
from pipeline.streams import Bus

AT_ONCE = 100


def spill_dead(bus: Bus, path: Path, keep: int) -> int:
    """Move the oldest dead letters over `keep` from Redis to the JSON lines of `path` (payloads in base64); returns how many.

    A crash in its middle may write some lines twice; `spilled_numbers` counts them once.

    Raises:
        OSError: the disk is full; what was not written stays in Redis.
    """
    spilled = 0
    while (excess := bus.dead_count() - keep) > 0:
        letters = bus.dead_letters(min(excess, AT_ONCE))
        with path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(letter) + b"\n" for letter in letters))
            file.flush()
            os.fsync(file.fileno())
        bus.drop_dead([letter.entry_id for letter in letters])
        spilled += len(letters)
    return spilled


def spilled_numbers(path: Path) -> list[int]:
    """The numbers of the dead letters in `path`, in order. A last line that a crash tore is passed over: Redis has that letter still."""
    if not path.exists():
        return []
    whole = (line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    letters = {letter.entry_id: letter.number for letter in (msgspec.json.decode(line, type=DeadLetter) for line in whole)}
    return list(letters.values())
