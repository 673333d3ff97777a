"""Large files, written and read past the page cache where the file system can.

Then a processor has next to nothing to do: the disk reads and writes the memory itself. Beside a
trainer that takes all cores, the copy to or from the cache takes several times as long as the disk.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

DIRECT_BYTES = 32 << 20
"""Smaller files go through the page cache, where the next to read them finds them."""
BLOCK_BYTES = 4096
"""Memory, places and lengths have to be multiples of it."""
_AT_ONCE_BYTES = 64 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def aligned_memory(size_bytes: int) -> Bytes:
    """[size_bytes] memory that `write_durably` writes without a copy. Its content is undefined."""
    whole = np.empty(size_bytes + BLOCK_BYTES, dtype=np.uint8)
    start = -whole.ctypes.data % BLOCK_BYTES
    return whole[start : start + size_bytes]


def write_durably(path: Path, data: Bytes) -> None:
    """Write `data` as the file `path`, and bring it to the disk.

    Raises:
        OSError: the disk is full.
    """
    aligned = data.ctypes.data % BLOCK_BYTES == 0
    if data.size < DIRECT_BYTES or not aligned or not _written_directly(path, data):
        _write(path, data, 0)


def read_whole(path: Path) -> Bytes:
    """[n], the bytes of the file `path`.

    Raises:
        OSError: it is gone, or cannot be read.
    """
    if path.stat().st_size < DIRECT_BYTES:
        return np.fromfile(path, dtype=np.uint8)
    try:
        return _read(path, _DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _read(path, 0)


def _written_directly(path: Path, data: Bytes) -> bool:
    """Write `data` past the page cache; False where the file system cannot."""
    try:
        _write(path, data, _DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _write(path: Path, data: Bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
    try:
        whole_blocks = data.size // BLOCK_BYTES * BLOCK_BYTES
        _write_all(descriptor, data[:whole_blocks].data)
        if whole_blocks < data.size:
            last = aligned_memory(BLOCK_BYTES)
            last[: data.size - whole_blocks] = data[whole_blocks:]
            _write_all(descriptor, last.data)
            os.ftruncate(descriptor, data.size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`: one call may take less than it is given."""
    start = 0
    while start < len(data):
        start += os.write(descriptor, data[start : start + _AT_ONCE_BYTES])


def _read(path: Path, flags: int) -> Bytes:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        size = os.fstat(descriptor).st_size
        # Reads end at a block's end, or at the file's.
        data = aligned_memory(size + -size % BLOCK_BYTES)
        start = 0
        while start < size:
            taken = os.readv(descriptor, [data[start : start + _AT_ONCE_BYTES].data])
            if not taken:
                raise OSError(errno.EIO, "the file became shorter while it was read", str(path))
            start += taken
        return data[:size]
    finally:
        os.close(descriptor)
