"""A run's journal: every record that the training depended on, in the order in which it did.

`<run directory>/journal/` holds segments, named by the position of their first byte. A segment is
a heading and then frames. A frame is a head (the payload's length, a checksum, the kind, the time,
the number) and a payload. A kind that this version does not know is refused, never skipped.

A journal from which nothing is trimmed is a recording: `<run directory>/recording/`, the same
files, and `images/` with the images that records name, each in a file named by its digest.

It is durable before each checkpoint, which holds its length, and cut back to that length when the
trainer resumes from the checkpoint. What was behind is kept in a file of its own until the trainer
has taken it again. So a journal holds nothing that the training has lost.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import msgspec

from onstream.pipeline.run_files.durable import sync

FOLDER = "recording"
JOURNAL = "journal"
UNSETTLED = "unsettled.segment"
"""Records that were considered before the trainer resumed, until it has considered them again."""
IMAGES = "images"
SEGMENT_BYTES = 256 << 20
_HEADING = b"onstream recording 1\n"
# payload bytes, CRC-32 of what follows, kind, seconds since the epoch, number
_HEAD = struct.Struct("<IIBdQ")
_CHECKED_FROM = 8
_RECORD = 1
_OPENED = 2
_STEPPED = 3


class RecordingError(Exception):
    """A recording that is damaged, or was made by another version."""


class ResumeMark(msgspec.Struct, frozen=True):
    """A trainer started at `step`: of the records before, it knows what its checkpoint has settled.

    `digest` is that of the policy version it started from. `settings` may differ from those of the
    trainer before it. `conditions` are what the last bit of a sum may depend on: threads, library,
    processor.
    """

    step: int
    digest: str
    settings: dict[str, Any]
    conditions: dict[str, Any]


class StepMark(msgspec.Struct, frozen=True):
    """The records so far completed the batch of `step`, which made the policy of `digest`.

    `metrics` follow from those records alone.
    """

    step: int
    digest: str
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecordFrame:
    """A rollout or tombstone as it was on the wire; `taken` is in seconds since the epoch."""

    number: int
    taken: float
    payload: bytes


class JournalMark(msgspec.Struct, frozen=True):
    """What a checkpoint says of the journal in `folder` of the run's directory.

    It had `end` bytes. From `first` on it holds every record that the training had considered and
    not settled.
    """

    folder: str
    first: int
    end: int


Frame = RecordFrame | ResumeMark | StepMark
_MARKS: dict[int, type[ResumeMark | StepMark]] = {_OPENED: ResumeMark, _STEPPED: StepMark}


class Recorder:
    """Appends to the recording in `directory`, which is first cut back to `keep_bytes` bytes.

    What is appended is in the kernel's hands at once. A frame that the disk takes only in part is
    cut off again, with an OSError.
    """

    def __init__(self, directory: Path, keep_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        cut(directory, keep_bytes)
        self._directory = directory
        self._changing_file = Lock()
        self._failed_sync: OSError | None = None
        self.position = 0
        """Bytes so far, in all segments, those that were trimmed included."""
        self._open(max(_starts(directory), default=keep_bytes))

    def record(self, number: int, taken: float, payload: bytes) -> None:
        """Append the rollout or tombstone in `payload`."""
        self._append(_RECORD, taken, number, payload)

    def mark(self, mark: ResumeMark | StepMark, at: float) -> None:
        """Append `mark`, made at `at`."""
        kind = _OPENED if isinstance(mark, ResumeMark) else _STEPPED
        self._append(kind, at, mark.step, msgspec.json.encode(mark))

    def sync(self) -> int:
        """Make all of it durable; returns how many bytes are. Another thread may append meanwhile.

        Raises:
            OSError: the disk is full, or failed.
        """
        with self._changing_file:
            position = self.position
            if not self._file.closed:
                self._sync_file()
        return position

    def close(self) -> None:
        """Close the file."""
        with self._changing_file:
            self._file.close()

    def _append(self, kind: int, at: float, number: int, payload: bytes) -> None:
        if self._file.tell() >= SEGMENT_BYTES:
            self._next_segment()
        if not self._file.tell():  # a full disk had no room for it
            self._write(_HEADING)
        self._write(_packed(kind, at, number, payload))

    def _write(self, data: bytes) -> None:
        """Append `data` now: nothing stays in a buffer until the file is another trainer's."""
        written = self._file.write(data)
        if written != len(data):
            os.truncate(self._file.fileno(), self._file.tell() - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
        self.position += len(data)

    def _next_segment(self) -> None:
        with self._changing_file:
            self._sync_file()
            self._file.close()
            self._open(self.position)

    def _open(self, start: int) -> None:
        self._file = (self._directory / _name(start)).open("ab", buffering=0)
        self.position = start + self._file.tell()
        if not self._file.tell():
            self._write(_HEADING)

    def _sync_file(self) -> None:
        if self._failed_sync is not None:
            # The kernel may have given up the bytes: a second sync would succeed without them.
            raise self._failed_sync
        try:
            os.fsync(self._file.fileno())
            sync(self._directory)
        except OSError as error:
            self._failed_sync = error
            raise


def save_image(directory: Path, digest: str, data: bytes) -> None:
    """Put an image beside the recording in `directory`, durably, unless it is there.

    Raises:
        OSError: the disk is full.
    """
    path = directory / IMAGES / digest
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(data)
    sync(unfinished)
    unfinished.rename(path)
    sync(path.parent)


def images(directory: Path, digests: Sequence[str]) -> list[bytes | None]:
    """The bytes of images that the recording in `directory` names, by their digests.

    None for one that was gone when its record was recorded.
    """
    paths = [directory / IMAGES / digest for digest in digests]
    return [path.read_bytes() if path.exists() else None for path in paths]


def exists(directory: Path) -> bool:
    """Whether `directory` holds a recording."""
    return bool(_starts(directory))


def size_bytes(directory: Path) -> int:
    """Bytes of the recording in `directory`; 0 where there is none."""
    last = max(_starts(directory), default=None)
    return 0 if last is None else _end(directory, last)


def cut(directory: Path, keep_bytes: int) -> None:
    """Cut the recording in `directory` back to its first `keep_bytes` bytes, if it is longer."""
    for start in _starts(directory):
        path = directory / _name(start)
        if start >= keep_bytes:
            path.unlink()
        elif path.stat().st_size > keep_bytes - start:
            os.truncate(path, keep_bytes - start)


def trim(directory: Path, upto: int) -> None:
    """Remove the segments of `directory` that end at the position `upto` or before.

    The last one stays, whatever it holds: the next position follows from it.
    """
    for first, last in _segments(directory)[:-1]:
        if last <= upto:
            (directory / _name(first)).unlink()


def begin(directory: Path) -> int:
    """The position of the first byte that has not been trimmed."""
    return min(_starts(directory), default=0)


def write_records(path: Path, records: Iterable[RecordFrame]) -> list[int]:
    """Write one durable file of `records` in the place of `path`; returns their numbers, in order.

    Without any, `path` is removed.

    Raises:
        OSError: the disk is full; `path` is as it was.
    """
    fresh = path.with_name(f"{path.name}.new")
    numbers = []
    with fresh.open("wb") as file:
        file.write(_HEADING)
        for record in records:
            file.write(_packed(_RECORD, record.taken, record.number, record.payload))
            numbers.append(record.number)
        file.flush()
        os.fsync(file.fileno())
    if numbers:
        fresh.rename(path)
    else:
        fresh.unlink()
        path.unlink(missing_ok=True)
    sync(path.parent)
    return numbers


def read_records(path: Path) -> Iterator[RecordFrame]:
    """The records in the file `path` of `write_records`; none where there is no such file.

    Raises:
        RecordingError: the file is damaged.
    """
    if not path.exists():
        return
    size_bytes = path.stat().st_size
    for frame in _frames_of(path, 0, size_bytes, torn_from=size_bytes):
        if isinstance(frame, RecordFrame):
            yield frame


def records(directory: Path, start: int = 0) -> Iterator[RecordFrame]:
    """The records from the position `start` on.

    Raises:
        RecordingError: a frame is damaged, or a segment is missing.
    """
    return (frame for frame in frames(directory, start) if isinstance(frame, RecordFrame))


def frames(
    directory: Path, start: int = 0, end: int | None = None, *, durable: int = 0
) -> Iterator[Frame]:
    """The frames from the position `start` (one that a `Recorder` gave) up to `end`.

    A last frame that was still being written is left out, but is an error within the first
    `durable` bytes, which a checkpoint holds.

    Raises:
        RecordingError: a frame is damaged, a segment is missing, or another version wrote it.
    """
    segments = _segments(directory)
    whole = size_bytes(directory)
    _refuse_gaps(directory, segments, start)
    for first, last in segments:
        upto = last if end is None else min(end, last)
        if start < upto:
            path = directory / _name(first)
            at = max(start - first, 0)
            yield from _frames_of(path, at, upto - first, torn_from=durable - first)
    if whole < durable:
        raise RecordingError(
            f"{directory} has {whole} bytes; a checkpoint of the run names {durable}"
        )


def _refuse_gaps(directory: Path, segments: Sequence[tuple[int, int]], start: int) -> None:
    begins = [first for first, _ in segments]
    ends = [begins[0] if begins and begins[0] <= start else 0, *(last for _, last in segments)]
    if begins != ends[: len(begins)]:
        raise RecordingError(
            f"a segment is missing in {directory}; it has those that begin at {begins}"
        )


def _frames_of(path: Path, at: int, end: int, *, torn_from: int) -> Iterator[Frame]:
    """The frames of one segment; one that `end` cuts short may begin at `torn_from` or after."""
    with path.open("rb") as file:
        at = max(at, len(_HEADING))
        if end >= at and file.read(len(_HEADING)) != _HEADING:
            raise RecordingError(f"{path} does not begin with {_HEADING.decode().strip()!r}")
        file.seek(at)
        while at < end:
            read = _read_frame(file, end - at)
            if read is None and at >= torn_from:
                return
            if read is None or not _is_intact(*read):
                raise RecordingError(f"{path} is damaged at byte {at}")
            head, payload = read
            yield _frame(head, payload, path)
            at += len(head) + len(payload)


def _read_frame(file: BinaryIO, left_bytes: int) -> tuple[bytes, bytes] | None:
    """The head and payload of the next frame; None when it is longer than `left_bytes`."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    payload_bytes = _HEAD.unpack(head)[0]
    if _HEAD.size + payload_bytes > left_bytes:
        return None
    return head, file.read(payload_bytes)


def _is_intact(head: bytes, payload: bytes) -> bool:
    checksum = _HEAD.unpack(head)[1]
    return bool(zlib.crc32(payload, zlib.crc32(head[_CHECKED_FROM:])) == checksum)


def _packed(kind: int, at: float, number: int, payload: bytes) -> bytes:
    """A frame as it is written."""
    head = _HEAD.pack(len(payload), 0, kind, at, number)
    checksum = zlib.crc32(payload, zlib.crc32(head[_CHECKED_FROM:]))
    return _HEAD.pack(len(payload), checksum, kind, at, number) + payload


def _frame(head: bytes, payload: bytes, path: Path) -> Frame:
    _, _, kind, taken, number = _HEAD.unpack(head)
    if kind == _RECORD:
        return RecordFrame(number, taken, payload)
    if kind not in _MARKS:
        raise RecordingError(f"{path} has a frame of kind {kind}, which this version does not know")
    return msgspec.json.decode(payload, type=_MARKS[kind])


def _segments(directory: Path) -> list[tuple[int, int]]:
    """Begin and end of each segment, as positions in the recording, in order."""
    return [(start, _end(directory, start)) for start in sorted(_starts(directory))]


def _end(directory: Path, start: int) -> int:
    return start + (directory / _name(start)).stat().st_size


def _name(start: int) -> str:
    return f"{start:015d}.segment"


def _starts(directory: Path) -> list[int]:
    return [int(path.stem) for path in directory.glob("*.segment")]
