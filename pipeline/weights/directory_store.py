"""Policy versions on disk, and the transport `filesystem`: published whole or not at all, and
pruned.

`<run directory>/policies/000007/` is a Hugging Face model directory. It comes into being by one
rename of a directory that was written and synced under another name, so a reader meets no
half-written version; the digest catches what a crash of the machine, a failing disk or a replaced
version would leave. Deltas are files of `policies/deltas/`, named by what they lead to and from.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.run_files.durable import digest_of, sync
from onstream.pipeline.weights.policy import WEIGHTS_FILE, Bytes, LoadedPolicy, WeightsError
from onstream.pipeline.weights.store import StoredWeights, VersionId

if TYPE_CHECKING:
    from torch import Tensor

_FOLDER = "policies"
_DELTAS = f"{_FOLDER}/deltas"
_DELTA = re.compile(r"(\d+)-([0-9a-f]+)-on-(\d+)-([0-9a-f]+)\.safetensors")
_UNFINISHED = ".unfinished-"
_REMOVED = ".removed-"
_LEFT_OUT = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".index.json",
    ".onnx",
)


def publish(
    run_dir: Path, number: int, state: Mapping[str, Tensor], model_files_from: Path
) -> PolicyVersion:
    """Write version `number`: `state` as safetensors, beside the configuration and tokenizer files
    of `model_files_from`.

    A version that is there already with the same weights stays as it is; one with other weights is
    replaced. Durable on return, if the files of `model_files_from` are: they are linked where the
    file system can. Of tensors that share their memory (a tied head) the first is written.
    """
    policy = LoadedPolicy.of(number, state)
    write_directory(run_dir, number, policy.digest, policy.data, model_files_from)
    return announced(policy)


def announced(policy: LoadedPolicy) -> PolicyVersion:
    """What the generators are told of `policy`. Its path is where its model directory is, if one
    was written.
    """
    return PolicyVersion(
        number=policy.number,
        digest=policy.digest,
        path=_path(policy.number),
        size_bytes=policy.data.size,
    )


def write_directory(
    run_dir: Path, number: int, digest: str, data: Bytes, model_files_from: Path
) -> None:
    """Write the safetensors file `data`, version `number` of `digest`, as a model directory, as
    `publish` says.
    """
    folder = run_dir / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final = run_dir / _path(number)
    unfinished = folder / f"{_UNFINISHED}{number:06d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    if _holds(final, digest):
        return
    unfinished.mkdir()
    _link_model_files(model_files_from, unfinished)
    (unfinished / WEIGHTS_FILE).write_bytes(data.data)
    sync(unfinished / WEIGHTS_FILE)
    sync(unfinished)
    _discard(final)
    unfinished.rename(final)
    sync(folder)


class DirectoryReader:
    """A generator's end of the transport `filesystem`: the trainer's run directory, which it can
    read.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    @property
    def where(self) -> str:
        """The folder."""
        return f"in {self._run_dir / _FOLDER}"

    def parts(self) -> list[StoredWeights]:
        """The model directories and the deltas that are there."""
        fulls = []
        for path in (self._run_dir / _FOLDER).glob("[0-9]*"):
            if path.name.isdecimal() and (size := _size(path / WEIGHTS_FILE)) is not None:
                fulls.append(
                    StoredWeights(int(path.name), "", size, f"{_FOLDER}/{path.name}/{WEIGHTS_FILE}")
                )
        return fulls + self._deltas()

    def _deltas(self) -> list[StoredWeights]:
        found = []
        for path in (self._run_dir / _DELTAS).glob("[0-9]*"):
            if (name := _DELTA.fullmatch(path.name)) and (size := _size(path)) is not None:
                number, digest, base_number, base_digest = name.groups()
                found.append(
                    StoredWeights(
                        int(number),
                        digest,
                        size,
                        f"{_DELTAS}/{path.name}",
                        VersionId(int(base_number), base_digest),
                    )
                )
        return found

    def read(self, part: StoredWeights) -> Bytes:
        """The bytes of `part`'s file.

        Raises:
            WeightsError: it is gone.
        """
        path = self._run_dir / part.place
        try:
            return np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise WeightsError(
                f"version {part.number} cannot be read from {path}: {error}"
            ) from error


class DirectoryWriter(DirectoryReader):
    """The trainer's end of the transport `filesystem`. A full set is a model directory, with the
    files of `model_files` in it.
    """

    def __init__(self, run_dir: Path, model_files: Path) -> None:
        super().__init__(run_dir)
        self._model_files = model_files

    def room_bytes(self) -> float:
        """No bound but the disk's."""
        return math.inf

    def put(self, part: StoredWeights, data: Bytes) -> StoredWeights:
        """Write a model directory, or a delta's file.

        Raises:
            OSError: it cannot be written.
        """
        if part.base is None:
            write_directory(self._run_dir, part.number, part.digest, data, self._model_files)
            return msgspec.structs.replace(part, place=f"{_path(part.number)}/{WEIGHTS_FILE}")
        place = f"{_DELTAS}/{part.number:06d}-{part.digest}-on-{part.base.number:06d}-{part.base.digest}.safetensors"
        path = self._run_dir / place
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{_UNFINISHED}{part.number:06d}")
        unfinished.write_bytes(data.data)
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)
        if not _holds(old := self._run_dir / _path(part.number), part.digest):
            _discard(old)  # other weights under this number, of a story that ended
        return msgspec.structs.replace(part, place=place)

    def keep(self, parts: Collection[StoredWeights]) -> None:
        """Remove the deltas that are not among `parts`; model directories serve others too, and are
        left to `prune`.
        """
        places = {part.place for part in parts}
        for gone in (part for part in self._deltas() if part.place not in places):
            (self._run_dir / gone.place).unlink(missing_ok=True)


def prune(run_dir: Path, keep: int, pinned: Collection[int] = ()) -> list[int]:
    """Remove all model directories but the `keep` newest and the `pinned` ones, and what a crash
    left unfinished.

    For a pinned version that is there as deltas alone, the directory that they start from stays.
    Returns the numbers removed.
    """
    folder = run_dir / _FOLDER
    if not folder.is_dir():
        return []
    for left in [*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_REMOVED}*")]:
        shutil.rmtree(left)
    for unfinished in (run_dir / _DELTAS).glob(f"{_UNFINISHED}*"):
        unfinished.unlink()
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    needed = {max((number for number in numbers if number <= pin), default=pin) for pin in pinned}
    gone = [number for number in numbers[: max(0, len(numbers) - keep)] if number not in needed]
    for number in gone:
        _discard(folder / f"{number:06d}")
    return gone


def _path(number: int) -> str:
    return f"{_FOLDER}/{number:06d}"


def _holds(directory: Path, digest: str) -> bool:
    return (directory / WEIGHTS_FILE).is_file() and digest_of(directory / WEIGHTS_FILE) == digest


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # pruned since its directory was listed
        return None


def _link_model_files(source: Path, target: Path) -> None:
    """Everything of a model directory but weights, however they are stored; by links, since writing
    them costs more than the weights.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_LEFT_OUT):
            try:
                os.link(path.resolve(), target / path.name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, target / path.name)
                sync(target / path.name)


def _discard(path: Path) -> None:
    """Remove a directory; renamed first, so that a crash on the way leaves no version with half its
    files.
    """
    if path.exists():
        doomed = path.with_name(_REMOVED + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
