"""A policy version in memory: one safetensors file whose digest was checked, and its tensors."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onstream.pipeline.weights.safetensors_layout import layout_of, view

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
