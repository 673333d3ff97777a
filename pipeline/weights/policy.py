"""A policy version in memory: one safetensors file whose digest was checked, and its tensors.

A file is the length of its header (<u8), the header (JSON), and the tensors' bytes, little-endian,
one after the other. https://huggingface.co/docs/safetensors describes the format.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]
WEIGHTS_FILE = "model.safetensors"

# Each process that writes files for others of this machine has one directory among the temporary
# files ($TMPDIR), and keeps a lock on a file in it. The kernel drops the lock with the process,
# however it ended and in whatever container it ran. The next process that needs such a directory
# removes those without a lock.
_SCRATCH_PREFIX = "onstream-policies-"
_SCRATCH_LOCK = "lock"

_LENGTH_BYTES = 8  # of the number that says how long the header is
_TYPES: Final = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The dtypes that published weights may have: torch's name, and bytes per element."""


class WeightsError(Exception):
    """A policy version cannot be loaded: it is missing, torn, replaced, or of another model."""


class LoadedPolicy:
    """All weights of policy version `number`, as a transport delivered them.

    Read-only: nobody changes `data` or the tensors, which share its memory.

    Args:
        number: of the version.
        digest: SHA-256 of `data`, in hexadecimal.
        data: [n], a whole safetensors file.

    Raises:
        WeightsError: `data` has another digest, or is not a safetensors file.
    """

    def __init__(self, number: int, digest: str, data: Bytes) -> None:
        found = digest_of_bytes(data)
        if found != digest:
            raise WeightsError(
                f"the weights have the digest {found[:12]}; "
                f"version {number} was announced with {digest[:12]}"
            )
        try:
            self.layout = layout_of(data)
        except ValueError as error:
            raise WeightsError(f"version {number} cannot be read: {error}") from error
        self.number = number
        self.digest = digest
        self.data = data

    @classmethod
    def of(cls, number: int, state: Mapping[str, Tensor]) -> LoadedPolicy:
        """`state` as version `number`. Of tensors that share their memory the first is used."""
        data = serialised(state)
        return cls(number, digest_of_bytes(data), data)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, on the CPU, without a copy. They keep the memory alive."""
        return {name: view(self.data, entry) for name, entry in self.layout.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name."""
        return {name: entry.shape for name, entry in self.layout.items()}

    def file(self) -> Path:
        """These weights as a safetensors file, for other processes of this machine.

        It is alone in its directory. It is written at the first call, among the temporary files
        ($TMPDIR), and removed with this object.

        Raises:
            OSError: it cannot be written.
        """
        return self._file

    @cached_property
    def _file(self) -> Path:
        directory = tempfile.mkdtemp(prefix=f"{self.number:06d}-", dir=scratch())
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        path = Path(directory) / WEIGHTS_FILE
        path.write_bytes(self.data.data)
        return path


def digest_of_bytes(data: Bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal; `run_files.durable.digest_of` is that of a file."""
    return hashlib.sha256(data.data).hexdigest()


def read_file(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file with the SHA-256 `digest`, mapped rather than copied.

    Raises:
        WeightsError: the file is missing, has another digest, or is not a safetensors file.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")
        if (found := digest_of_bytes(data)) != digest:
            raise WeightsError(
                f"{path} has the digest {found[:12]}; it was announced with {digest[:12]}"
            )
        return {name: view(data, entry) for name, entry in layout_of(data).items()}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def serialised(state: Mapping[str, Tensor]) -> Bytes:
    """[n], `state` as a safetensors file: the same weights give the same bytes.

    Of tensors that share their memory the first is in it.
    """
    from safetensors.torch import save

    data = save(_distinct(state), metadata={"format": "pt"})
    return np.frombuffer(bytearray(data), dtype=np.uint8)  # a bytearray, since it is writable


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if same in seen:
            continue
        # The file format has no views: a tensor that only overlaps another is written separately.
        storage = (tensor.untyped_storage().data_ptr(),)
        if storage in seen:
            tensor = tensor.clone()
        tensors[name] = tensor.detach().cpu().contiguous()
        seen |= {same, storage}
    return tensors


@cache
def scratch() -> Path:
    """This process's directory. It is removed when the process ends normally.

    Raises:
        OSError: it cannot be made.
    """
    _remove_abandoned()
    # Made under a hidden name and renamed once it is locked: in between, others would take it for
    # the directory of a dead process.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH_PREFIX}"))
    descriptor = os.open(hidden / _SCRATCH_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    directory = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _remove_abandoned() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_SCRATCH_PREFIX}*/{_SCRATCH_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # another user's, or removed by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is alive
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class TensorLocation:
    """One tensor: bytes `[start, stop)` of the file, in elements of `size` bytes."""

    dtype: str
    size: int
    shape: tuple[int, ...]
    start: int
    stop: int


def layout_of(data: NDArray[np.uint8]) -> dict[str, TensorLocation]:
    """The tensors in `data`, a whole safetensors file, by name.

    Raises:
        ValueError: it is not a safetensors file, or has tensors of a dtype outside `_TYPES`.
    """
    try:
        length = int(data[:_LENGTH_BYTES].view("<u8")[0])
        tensors_start = _LENGTH_BYTES + length
        header: dict[str, Any] = json.loads(data[_LENGTH_BYTES:tensors_start].tobytes())
        header.pop("__metadata__", None)
        return {
            name: _location(fields, tensors_start, data.size) for name, fields in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{data.size} bytes are no safetensors file ({error})") from error


def _location(fields: dict[str, Any], tensors_start: int, end: int) -> TensorLocation:
    dtype, size = _TYPES[fields["dtype"]]
    start, stop = (tensors_start + offset for offset in fields["data_offsets"])
    shape = tuple(fields["shape"])
    within = tensors_start <= start <= stop <= end
    if not within or stop - start != size * math.prod(shape):
        raise ValueError(f"a tensor {dtype} {list(shape)} at bytes {start} to {stop} of {end}")
    return TensorLocation(dtype, size, shape, start, stop)


def view(data: NDArray[np.uint8], location: TensorLocation) -> Tensor:
    """The tensor at `location` of `data`, whose memory it shares."""
    import torch

    flat = torch.from_numpy(data[location.start : location.stop])
    values: Tensor = flat.view(getattr(torch, location.dtype))
    return values.reshape(location.shape)
