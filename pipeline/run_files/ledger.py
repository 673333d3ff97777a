"""The ledger of a run: which numbers are settled, and how.

A number is settled once its fate is fixed: trained, or not trained for a stated reason. The ledger
is written with each checkpoint, and cut back when the run resumes from one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from onstream.pipeline.run_files.durable import digest_of
from onstream.settings.decoding import UNDECODABLE

LEDGER = "trained.jsonl"
"""The ledger's name in the run's directory."""

Fate = Literal["trained", "dead", "stale", "not_verified", "group_dead", "purged"]


class Settled(msgspec.Struct, frozen=True):
    """One line of `trained.jsonl`: `number` met its `fate` in the training step `step`."""

    number: int
    fate: Fate
    step: int


class Ledger:
    """`trained.jsonl`: append-only, one line per settled number, durable when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size_bytes(self) -> int:
        """The file's size in bytes; 0 where there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, lines: Iterable[Settled]) -> int:
        """Write `lines` and sync them; returns the file's size in bytes, for the checkpoint."""
        with self.path.open("ab") as file:
            file.write(encoded(lines))
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, size_bytes: int) -> int:
        """Cut the file back to the size that a checkpoint holds.

        Returns how many bytes it is too short (0 in an intact run).
        """
        have = self.size_bytes
        if have > size_bytes:
            os.truncate(self.path, size_bytes)
        return max(0, size_bytes - have)

    def rewrite(self, lines: Iterable[Settled]) -> int:
        """Replace the whole file by `lines`; returns its size in bytes."""
        self.path.unlink(missing_ok=True)
        return self.append(lines)

    def read(self) -> Iterator[Settled]:
        """The lines in the order written. A last line still being written is left out.

        Raises:
            ValueError: a complete line is no line of a ledger.
        """
        decode = msgspec.json.Decoder(Settled).decode
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for at, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield decode(line)
                except UNDECODABLE as error:
                    raise ValueError(f"{self.path}, line {at}: {error}") from error


def encoded(lines: Iterable[Settled]) -> bytes:
    """`lines` as they are in the file."""
    encode = msgspec.json.Encoder().encode
    return b"".join(encode(line) + b"\n" for line in lines)


def ledger_differs(path: Path, size_bytes: int, digest: str | None) -> bool:
    """Whether the first `size_bytes` of the ledger `path` are others than a checkpoint remembers by
    their SHA-256; a checkpoint of an earlier version remembers none.
    """
    if digest is None:
        return False
    if not path.exists():
        return size_bytes > 0
    return digest_of(path, size_bytes) != digest
