"""Large files are written and read past the page cache, where the file system can; the bytes are
the same either way.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onstream.pipeline.run_files import direct_io
from onstream.pipeline.run_files.direct_io import (
    BLOCK_BYTES,
    Bytes,
    aligned_memory,
    read_whole,
    write_durably,
)


@pytest.fixture(autouse=True)
def every_file_counts_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "DIRECT_BYTES", 1)
    monkeypatch.setattr(direct_io, "_AT_ONCE_BYTES", 2 * BLOCK_BYTES)


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Those that files were opened with."""
    seen: list[int] = []
    real_open = os.open

    def noted(path: Any, flags: int, *mode: int) -> int:
        seen.append(flags & os.O_DIRECT)
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", noted)
    yield seen


def some(size: int) -> Bytes:
    data = aligned_memory(size)
    data[:] = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    return data


@pytest.mark.parametrize(
    "size", [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES, 70_001]
)
def test_a_file_comes_back_as_it_was_written_whatever_its_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    data = some(size)
    write_durably(path, data)
    assert path.read_bytes() == data.tobytes()
    assert read_whole(path).tobytes() == data.tobytes()
    write_durably(path, some(3))
    assert path.stat().st_size == 3, "a longer one was there before"


def test_memory_that_is_not_aligned_goes_through_the_cache(
    tmp_path: Path, flags: list[int]
) -> None:
    data = some(3 * BLOCK_BYTES)[1:]
    write_durably(tmp_path / "file", data)
    assert flags == [0]
    assert (tmp_path / "file").read_bytes() == data.tobytes()


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_that_cannot_gets_it_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    direct = set[int]()
    real: Any = {"open": os.open, "write": os.write, "readv": os.readv}

    def opened(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        found: int = real["open"](path, flags, *mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(found)
        return found

    def refusing(name: str) -> Any:
        def call(descriptor: int, data: Any) -> Any:
            if descriptor in direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real[name](descriptor, data)

        return call

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", refusing("write"))
    monkeypatch.setattr(os, "readv", refusing("readv"))
    data = some(10_000)
    write_durably(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert read_whole(tmp_path / "file").tobytes() == data.tobytes()


def test_a_full_disk_is_told_and_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "write", full)
        write_durably(tmp_path / "file", some(10_000))
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_begins_at_a_block() -> None:
    assert BLOCK_BYTES % mmap.PAGESIZE == 0
    for size in (1, 4097, 1 << 20):
        memory = aligned_memory(size)
        assert memory.size == size and memory.ctypes.data % BLOCK_BYTES == 0
