"""What durable files rest on: digests that tell a torn file, and syncs to the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def digest_of(path: Path, size_bytes: int | None = None) -> str:
    """The SHA-256 of a file, or of its first `size_bytes` bytes, in hexadecimal."""
    if size_bytes is not None:
        return hash_of_first(path, size_bytes).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_first(path: Path, size_bytes: int) -> hashlib._Hash:
    """SHA-256 over the first `size_bytes` bytes of a file, to go on with.

    Of no bytes, there need be no file.
    """
    digest = hashlib.sha256()
    if size_bytes:
        with path.open("rb") as file:
            while size_bytes > 0 and (part := file.read(min(size_bytes, 1 << 20))):
                digest.update(part)
                size_bytes -= len(part)
    return digest


def sync(path: Path) -> None:
    """Bring a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
