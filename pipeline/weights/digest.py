"""The digest of a policy version: a tree of SHA-256 over its tensors.

A leaf is the SHA-256 of up to `PIECE_BYTES` of a tensor. The root is that of a list (JSON) of every
tensor's name, dtype, shape and leaves, sorted by name. So it says nothing of files: the same
weights have the same digest in one file and in many. Leaves are computed in threads.

That of an adapter covers its note too. Earlier versions of Onstream took the SHA-256 of the one
safetensors file. The mark at the end of a digest tells the three apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from onstream.pipeline.processes import usable_cores
from onstream.pipeline.weights.adapter import text_note
from onstream.pipeline.weights.file_format import Bytes, TensorLocation

MARK = "-tree1"
ADAPTER_MARK = "-lora1"
PIECE_BYTES = 64 << 20
_ALONE_BYTES = 4 << 20  # hashing less takes no longer than starting threads
_MOST_THREADS = 16


def tree_digest(*files: tuple[Bytes, Mapping[str, TensorLocation]]) -> str:
    """The digest of the tensors in `files`, each a file's bytes and its layout."""
    return TreeDigest(*files).result()


class TreeDigest:
    """The digest of the tensors in `files`, computed while its maker does something else.

    Until `result` has returned, nobody may change the bytes.
    """

    def __init__(self, *files: tuple[Bytes, Mapping[str, TensorLocation]]) -> None:
        self._layouts = [layout for _, layout in files]
        self._notes = [note for data, _ in files if (note := text_note(data)) is not None]
        pieces = [piece for data, layout in files for piece in _pieces(data, layout)]
        if sum(len(piece) for piece in pieces) <= _ALONE_BYTES:
            self._leaves = iter([_sha256(piece) for piece in pieces])
            return
        pool = ThreadPoolExecutor(_threads(), "onstream-hash")
        self._leaves = pool.map(_sha256, pieces)
        pool.shutdown(wait=False)

    def result(self) -> str:
        """The digest; waits for it. To be called once."""
        tensors = []
        for layout in self._layouts:
            for name, location in layout.items():
                leaves = [next(self._leaves) for _ in _starts(location)]
                tensors.append([name, location.dtype, list(location.shape), leaves])
        tensors.sort()
        hashed = [*self._notes, tensors] if self._notes else tensors
        text = json.dumps(hashed, separators=(",", ":"))
        mark = ADAPTER_MARK if self._notes else MARK
        return hashlib.sha256(text.encode()).hexdigest() + mark


def is_of_file(digest: str) -> bool:
    """Whether an earlier version made `digest`: the SHA-256 of the whole safetensors file."""
    return not digest.endswith((MARK, ADAPTER_MARK))


def is_of_adapter(digest: str) -> bool:
    """Whether `digest` is that of an adapter."""
    return digest.endswith(ADAPTER_MARK)


def file_digest(data: Bytes) -> str:
    """What an earlier version took for the digest: the SHA-256 of `data`, in hexadecimal."""
    return _sha256(data.data)


def _pieces(data: Bytes, layout: Mapping[str, TensorLocation]) -> list[memoryview]:
    found = []
    for location in layout.values():
        for start in _starts(location):
            found.append(data[start : min(start + PIECE_BYTES, location.stop)].data)
    return found


def _starts(location: TensorLocation) -> range:
    return range(location.start, location.stop, PIECE_BYTES)


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _threads() -> int:
    return min(_MOST_THREADS, usable_cores())
