"""Policy versions on disk: published whole or not at all, read only when their digest is right, and pruned.

`<run directory>/policies/000007/` is a Hugging Face model directory. It comes into being by one rename of a directory that was
written and synced under another name, so a reader meets no half-written version; the digest catches what a crash of the
machine, a failing disk or a replaced version would leave.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import digest_of, sync
from pipeline.records import PolicyVersion

if TYPE_CHECKING:
    from torch import Tensor

_FOLDER = "policies"
_WEIGHTS = "model.safetensors"
_UNFINISHED = ".unfinished-"
_REMOVED = ".removed-"
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json", ".onnx")


class WeightsError(Exception):
    """A policy version that cannot be loaded: missing, torn, replaced, or of another model."""


def publish(run_dir: Path, number: int, state: Mapping[str, Tensor], model_files_from: Path) -> PolicyVersion:
    """Write version `number`: `state` as safetensors, beside the configuration and tokenizer files of `model_files_from`.

    A version that is there already with the same weights stays as it is; one with other weights is replaced. Durable on
    return, if the files of `model_files_from` are: they are linked where the file system can. Of tensors that share their
    memory (a tied head) the first is written.
    """
    folder = run_dir / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final, unfinished = folder / f"{number:06d}", folder / f"{_UNFINISHED}{number:06d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    _link_model_files(model_files_from, unfinished)
    _write(state, unfinished / _WEIGHTS)
    digest = digest_of(unfinished / _WEIGHTS)
    size = (unfinished / _WEIGHTS).stat().st_size
    if (final / _WEIGHTS).is_file() and digest_of(final / _WEIGHTS) == digest:
        shutil.rmtree(unfinished)
    else:
        sync(unfinished / _WEIGHTS)
        sync(unfinished)
        _discard(final)
        unfinished.rename(final)
        sync(folder)
    return PolicyVersion(number=number, digest=digest, path=f"{_FOLDER}/{final.name}", size_bytes=size)


def read_weights(run_dir: Path, policy: PolicyVersion) -> dict[str, Tensor]:
    """The tensors of `policy`, on the CPU.

    Raises:
        WeightsError: the file is missing, is not what was announced, or was replaced while it was read.
    """
    try:
        return read_file(run_dir / policy.path / _WEIGHTS, policy.digest)
    except WeightsError as error:
        raise WeightsError(f"version {policy.number} cannot be read: {error}") from error


def read_file(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose bytes have the sha256 `digest`, mapped from the file rather than copied.

    Raises:
        WeightsError: the file is missing, has another digest, or was replaced while it was read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise WeightsError(f"{path} has digest {found[:12]}; it was announced with {digest[:12]}")
            tensors: dict[str, Tensor] = load_file(path)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise WeightsError(f"{path} was replaced while it was read")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    return tensors


def prune(run_dir: Path, keep: int, pinned: Collection[int] = ()) -> list[int]:
    """Remove all but the `keep` newest versions and the `pinned` ones, and what a crash left unfinished; returns the numbers removed."""
    folder = run_dir / _FOLDER
    if not folder.is_dir():
        return []
    for left in [*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_REMOVED}*")]:
        shutil.rmtree(left)
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    gone = [number for number in numbers[: max(0, len(numbers) - keep)] if number not in pinned]
    for number in gone:
        _discard(folder / f"{number:06d}")
    return gone


def _write(state: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    seen: set[tuple[object, ...]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if same in seen:
            continue
        # The file format has no views: what merely overlaps another tensor is written as a tensor of its own.
        storage = (tensor.untyped_storage().data_ptr(),)
        tensors[name] = (tensor.clone() if storage in seen else tensor).detach().cpu().contiguous()
        seen |= {same, storage}
    save_file(tensors, path, metadata={"format": "pt"})


def _link_model_files(source: Path, target: Path) -> None:
    """Everything of a model directory but weights, however they are stored; by links, since writing them costs more than the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_LEFT_OUT):
            try:
                os.link(path.resolve(), target / path.name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, target / path.name)
                sync(target / path.name)


def _discard(path: Path) -> None:
    """Remove a directory; renamed first, so that a crash on the way leaves no version with half its files."""
    if path.exists():
        doomed = path.with_name(_REMOVED + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
