"""Files of JSON lines: a run appends to them, and cuts them back when it resumes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from onstream.settings.decoding import UNDECODABLE


class JsonLines:
    """One file of JSON objects, a line each.

    A line is in the kernel's hands when `write` returns: it outlives this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`. A line that the disk takes only in part is cut off again.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        line = msgspec.json.encode(row) + b"\n"
        written = self._file.write(line)
        if written != len(line):
            os.truncate(self.path, self._file.tell() - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if it does not exist.

    A last line that a kill cut short is left out.

    Raises:
        ValueError: another line than the last is not a JSON object.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = [line for line in whole.split(b"\n") if line]
    try:
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except UNDECODABLE as error:
        raise ValueError(f"{path}: {error}") from error


class GrowingRows:
    """A file of JSON lines that somebody else appends to, and cuts back on a resume."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last = b""
        """The last line that was read; it tells a file that was cut and has grown past it since."""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether all that was read before is void, and the rows that are new.

        A last line that is not whole yet is left for the next call.
        """
        if not self._path.exists():
            return False, []
        with self._path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            void = file.read(len(self._last)) != self._last
            if void:
                self._offset = 0
                self._last = b""
                file.seek(0)
            whole, newline, _ = file.read().rpartition(b"\n")
        lines = [line for line in whole.split(b"\n") if line]
        if lines:
            self._offset += len(whole) + len(newline)
            self._last = lines[-1] + newline
        return void, [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Cut `path` before its first line that is torn or that `keep` refuses.

    Returns how many lines went.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = 0
    for line in lines:
        if not line.endswith(b"\n") or not _kept(line, keep):
            break
        kept += 1
    if kept < len(lines):
        os.truncate(path, sum(len(line) for line in lines[:kept]))
    return len(lines) - kept


def _kept(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(msgspec.json.decode(line, type=dict[str, Any]))
    except UNDECODABLE:
        return False
