"""Dead letters over the number that Redis keeps go to a file of the run. None is ever dropped."""

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
    """Move the oldest dead letters over `keep` from Redis to `path`; returns how many.

    `path` holds JSON lines, with payloads in base64. Letters are written before they are deleted,
    so a crash in between writes some twice; `spilled` reads them once.

    Raises:
        OSError: the disk is full; what was not written stays in Redis.
    """
    moved = 0
    _cut_torn_line(path)
    while (excess := bus.state.dead_count() - keep) > 0:
        letters = bus.state.dead_letters(min(excess, AT_ONCE))
        with path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(letter) + b"\n" for letter in letters))
            file.flush()
            os.fsync(file.fileno())
        bus.state.delete_dead_letters([letter.entry_id for letter in letters])
        moved += len(letters)
    return moved


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line that a crash tore: what is appended to it would be lost too."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def spilled(path: Path) -> Iterator[DeadLetter]:
    """The dead letters in `path`, in order, each once.

    A last line that a crash tore is skipped: Redis still has that letter.
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
    """Take the letters of `entry_ids` out of `path`, all or none.

    For the trainer alone, which writes that file.
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
    """Every dead letter of the run once, read page by page.

    Those in Redis come first: one that is moved to the file meanwhile is then found there.
    """
    seen: set[bytes] = set()
    letters = bus.state.dead_letters(AT_ONCE)
    while letters:
        seen.update(letter.entry_id for letter in letters)
        yield from letters
        letters = bus.state.dead_letters(AT_ONCE, after=letters[-1].entry_id)
    yield from (letter for letter in spilled(run_dir / FILE) if letter.entry_id not in seen)


def dead_numbers(bus: Bus, run_dir: Path) -> set[int]:
    """The numbers of all dead letters, in Redis and in the file.

    Redis first: a letter that is moved meanwhile is then found at least once.
    """
    return {*bus.state.dead_numbers(), *spilled_numbers(run_dir / FILE)}
