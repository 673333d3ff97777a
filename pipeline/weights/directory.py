"""Policy versions on disk: published whole or not at all, read only when their digest is right, and pruned.

`<run directory>/policies/000007/` is a Hugging Face model directory. It comes into being by one rename of a directory that was
written and synced under another name, so a reader meets no half-written version; the digest catches what a crash of the
machine, a failing disk or a replaced version would leave.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.files import digest_of, sync
from pipeline.records import PolicyVersion
from pipeline.weights.policy import WEIGHTS_FILE, LoadedPolicy, WeightsError, digest_of_bytes, serialised

if TYPE_CHECKING:
    from torch import Tensor

_FOLDER = "policies"
_UNFINISHED = ".unfinished-"
_REMOVED = ".removed-"
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json", ".onnx")


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
    data = serialised(state)
    (unfinished / WEIGHTS_FILE).write_bytes(data.data)
    digest = digest_of_bytes(data)
    if (final / WEIGHTS_FILE).is_file() and digest_of(final / WEIGHTS_FILE) == digest:
        shutil.rmtree(unfinished)
    else:
        sync(unfinished / WEIGHTS_FILE)
        sync(unfinished)
        _discard(final)
        unfinished.rename(final)
        sync(folder)
    return PolicyVersion(number=number, digest=digest, path=f"{_FOLDER}/{final.name}", size_bytes=data.size)


class Directory:
    """A generator's end of the transport `filesystem`: reads versions from the trainer's run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def fetch(self, policy: PolicyVersion) -> LoadedPolicy:
        """The weights of `policy`, read at once: what is checked is what is loaded, whatever becomes of the file.

        Raises:
            WeightsError: the file is missing, or is not what was announced.
        """
        path = self._run_dir / policy.path / WEIGHTS_FILE
        try:
            data = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise WeightsError(f"version {policy.number} cannot be read from {path}: {error}") from error
        try:
            return LoadedPolicy(policy.number, policy.digest, data)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error


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
