"""A policy version in memory: one safetensors file whose digest was checked, and its tensors."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onstream.pipeline.run_files.direct_io import aligned_memory
from onstream.pipeline.weights.adapter import AdapterNote, note_of
from onstream.pipeline.weights.digest import TreeDigest, file_digest, is_of_file, tree_digest
from onstream.pipeline.weights.file_format import Bytes, TensorSpec, head_for, layout_of, view
from onstream.pipeline.weights.shards import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# Each process that writes files for others of this machine has one directory among the temporary
# files ($TMPDIR), and keeps a lock on a file in it. The kernel drops the lock with the process,
# however it ended and in whatever container it ran. The next process that needs such a directory
# removes those without a lock.
_SCRATCH_PREFIX = "onstream-policies-"
_SCRATCH_LOCK = "lock"


class WeightsError(Exception):
    """A policy version cannot be loaded: it is missing, torn, replaced, or of another model."""


@dataclass(frozen=True)
class WeightSum:
    """A weight that is added up, in float32, when it is needed: `base` and what `addition` gives.

    Sums that are made one after the other take the memory of one.
    """

    base: Tensor
    addition: Callable[[], Tensor]

    def values(self) -> Tensor:
        """The sum, without gradients."""
        import torch

        with torch.no_grad():
            return self.base.float() + self.addition()


def values_of(weight: Tensor | WeightSum) -> Tensor:
    """The values of `weight`: of a sum, made now."""
    return weight.values() if isinstance(weight, WeightSum) else weight


def unadapted(weight: Tensor | WeightSum) -> Tensor:
    """`weight` without what is added to it."""
    return weight.base if isinstance(weight, WeightSum) else weight


class LoadedPolicy:
    """All weights of policy version `number`, as a transport delivered them.

    Read-only: nobody changes `data` or the tensors, which share its memory. Where they are an
    adapter alone, `adapter` is its note.

    Args:
        number: of the version.
        digest: what the weights must have; None: whatever they have.
        data: [n], a whole safetensors file.

    Raises:
        WeightsError: `data` has another digest, or is not a safetensors file.
    """

    def __init__(self, number: int, digest: str | None, data: Bytes) -> None:
        try:
            self.layout = layout_of(data)
            self.adapter: AdapterNote | None = note_of(data)
        except ValueError as error:
            raise WeightsError(f"version {number} cannot be read: {error}") from error
        self.number = number
        self.data = data
        self._hashing = TreeDigest((data, self.layout))
        if digest is not None:
            require_digest(digest, self.digest, f"version {number}")

    @cached_property
    def digest(self) -> str:
        """The digest of the tensors. Threads compute it from the start; this waits for them."""
        return self._hashing.result()

    @classmethod
    def of(
        cls,
        number: int,
        state: Mapping[str, Tensor | WeightSum],
        dtype: torch.dtype | None = None,
        into: Bytes | None = None,
    ) -> LoadedPolicy:
        """`state` as version `number`. Of tensors that share their memory the first is used.

        Args:
            dtype: what all of them are cast to; None: each keeps its own.
            into: memory to use for it, if it has the right size.
        """
        return cls(number, None, serialised(state, dtype, into))

    def has_digest(self, digest: str) -> bool:
        """Whether these weights have `digest`, be it of today's kind or an earlier version's."""
        if is_of_file(digest):
            return file_digest(self.data) == digest
        return self.digest == digest

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


def require_digest(announced: str, found: str, what: str) -> None:
    """Make sure that `what` has the digest that it was announced with.

    Raises:
        WeightsError: it has not.
    """
    if announced == found:
        return
    text = f"the weights have the digest {found[:12]}; {what} was announced with {announced[:12]}"
    if is_of_file(announced):
        text += (
            " (a digest of the kind that earlier versions of Onstream made; the trainer announces "
            "the version anew when it starts)"
        )
    raise WeightsError(text)


def read_file(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose weights have `digest`, mapped rather than copied.

    Raises:
        WeightsError: the file is missing, has another digest, or is not a safetensors file.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c")
        layout = layout_of(data)
        require_digest(digest, tree_digest((data, layout)), str(path))
        return {name: view(data, entry) for name, entry in layout.items()}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def serialised(
    state: Mapping[str, Tensor | WeightSum],
    dtype: torch.dtype | None = None,
    into: Bytes | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Bytes:
    """[n], `state` as a safetensors file: the same weights give the same bytes.

    Each tensor is cast and copied straight to its place in the file, from whatever device. Of
    tensors that share their memory the first is in it. `dtype` and `into` are as in
    `LoadedPolicy.of`; `metadata` is added to the file's head.
    """
    tensors = _distinct(state)
    specs = {name: _spec(weight, dtype) for name, weight in tensors.items()}
    head, layout = head_for(specs, metadata)
    size = max((location.stop for location in layout.values()), default=len(head))
    # Memory that was used before takes a copy several times faster than fresh pages do.
    data = into if into is not None and into.size == size else aligned_memory(size)
    data[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    for name, location in layout.items():
        weight = tensors[name]
        view(data, location).copy_(values_of(weight))
    return data


def _spec(weight: Tensor | WeightSum, dtype: torch.dtype | None) -> TensorSpec:
    if isinstance(weight, WeightSum):
        return TensorSpec(_name(dtype) if dtype else "float32", tuple(weight.base.shape))
    return TensorSpec(_name(dtype or weight.dtype), tuple(weight.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _distinct(state: Mapping[str, Tensor | WeightSum]) -> dict[str, Tensor | WeightSum]:
    """Of tensors that are the same memory in the same form, the first alone."""
    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor | WeightSum] = {}
    for name, weight in state.items():
        if isinstance(weight, WeightSum):
            tensors[name] = weight
            continue
        same = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        if same in seen and weight.numel():
            continue
        tensors[name] = weight.detach()
        seen.add(same)
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
