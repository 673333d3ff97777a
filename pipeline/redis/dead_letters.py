"""Dead letters beyond the bound of what Redis keeps go to a file of the run. None is ever trimmed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.run_state import DeadLetter

FILE = "dead.jsonl"
AT_ONCE = 100


def spill_dead(bus: Bus, path: Path, keep: int) -> int:
    """Move the oldest dead letters over `keep` from Redis to the JSON lines of `path` (payloads in
    base64); returns how many.

    A crash in its middle may write some lines twice; `spilled_numbers` counts them once.

    Raises:
        OSError: the disk is full; what was not written stays in Redis.
    """
    moved = 0
    _mend(path)
    while (excess := bus.state.dead_count() - keep) > 0:
        letters = bus.state.dead_letters(min(excess, AT_ONCE))
        with path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(letter) + b"\n" for letter in letters))
            file.flush()
            os.fsync(file.fileno())
        bus.state.delete_dead_letters([letter.entry_id for letter in letters])
        moved += len(letters)
    return moved


def _mend(path: Path) -> None:
    """Cut off a last line that a crash tore: what is appended to it would be lost as well."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def spilled(path: Path) -> Iterator[DeadLetter]:
    """The dead letters in `path`, in order, each once. A last line that a crash tore is passed
    over: Redis has that letter still.
    """
    seen: set[bytes] = set()
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (
                line.endswith(b"\n")
                and (letter := msgspec.json.decode(line, type=DeadLetter)).entry_id not in seen
            ):
                seen.add(letter.entry_id)
                yield letter


def spilled_numbers(path: Path) -> list[int]:
    """The numbers of the dead letters in `path`, in order."""
    return [letter.number for letter in spilled(path)]


def forget_spilled(path: Path, entry_ids: Collection[bytes]) -> None:
    """Take the letters of `entry_ids` out of `path`, whole or not at all. For the trainer alone,
    which writes that file.
    """
    if not entry_ids or not path.exists():
        return
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        for letter in spilled(path):
            if letter.entry_id not in entry_ids:
                file.write(msgspec.json.encode(letter) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def all_letters(bus: Bus, run_dir: Path) -> Iterator[DeadLetter]:
    """Every dead letter of the run once, those in Redis first: one that spills meanwhile is met
    after that. A page of them in memory.
    """
    seen: set[bytes] = set()
    letters = bus.state.dead_letters(AT_ONCE)
    while letters:
        seen.update(letter.entry_id for letter in letters)
        yield from letters
        letters = bus.state.dead_letters(AT_ONCE, after=letters[-1].entry_id)
    yield from (letter for letter in spilled(run_dir / FILE) if letter.entry_id not in seen)


def dead_numbers(bus: Bus, run_dir: Path) -> set[int]:
    """The numbers of all dead letters, in Redis and spilled. Redis first: a letter that spills
    meanwhile is met at least once.
    """
    return {*bus.state.dead_numbers(), *spilled_numbers(run_dir / FILE)}
