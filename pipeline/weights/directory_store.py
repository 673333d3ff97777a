"""The transport `filesystem`: policy versions in the run directory, published whole and pruned.

`<run directory>/policies/000007/` is a Hugging Face model directory. It appears by one rename of a
directory that was written and synced under another name, so no reader finds half a version. The
digest shows what a crash of the machine, a failing disk or a replaced version may leave. Deltas are
files in `policies/deltas/`, named by the version they give and the one they are applied to. A
version that is an adapter belongs to the model directory `policies/base-<digest>/`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.run_files.durable import sync
from onstream.pipeline.weights.adapter import (
    ADAPTER_CONFIG,
    BASE,
    BASE_PREFIX,
    base_directory,
)
from onstream.pipeline.weights.digest import MARK
from onstream.pipeline.weights.file_format import Bytes
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError
from onstream.pipeline.weights.shards import (
    digest_in,
    note_in,
    read_weights,
    weights_place,
    write_weights,
)
from onstream.pipeline.weights.store import VersionId, WeightPart

if TYPE_CHECKING:
    from torch import Tensor

Fence = Callable[[], AbstractContextManager[None]]
_FOLDER = "policies"
_DELTAS = f"{_FOLDER}/deltas"
_DIGEST = f"[0-9a-f]+(?:{MARK})?"  # without the mark in a run that an earlier version began
_DELTA = re.compile(rf"(\d+)-({_DIGEST})-on-(\d+)-({_DIGEST})\.safetensors")
_UNFINISHED = ".unfinished-"
_REMOVED = ".removed-"
_NOT_LINKED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".index.json",
    ".onnx",
    ADAPTER_CONFIG,
)
_MODEL_CONFIG = "config.json"
_PINNED = "pinned"
"""The folder of the versions that must stay on disk: one empty file per version and use."""


def publish(
    run_dir: Path, number: int, state: Mapping[str, Tensor], model_files_from: Path
) -> PolicyVersion:
    """Write version `number`: `state` as safetensors, with the files of `model_files_from`.

    Those are its configuration and tokenizer; they are linked where the file system can. A version
    that is there already with the same weights stays as it is; one with other weights is replaced.
    Durable on return, if the files of `model_files_from` are. Of tensors that share their memory (a
    tied head) the first is written.
    """
    policy = LoadedPolicy.of(number, state)
    write_directory(run_dir, policy, model_files_from)
    return announced(policy)


def announced(policy: LoadedPolicy) -> PolicyVersion:
    """What generators are told of `policy`. Its path is that of its model directory, if any."""
    return PolicyVersion(
        number=policy.number,
        digest=policy.digest,
        path=_path_of(policy),
        size_bytes=policy.data.size,
    )


def write_directory(
    run_dir: Path, policy: LoadedPolicy, model_files_from: Path, fence: Fence = nullcontext
) -> None:
    """Write `policy`, all weights or an adapter, as a model directory, as `publish` says.

    The directory gets its own name inside `fence`, which raises in a trainer whose lease has passed
    to another one. Its digest is waited for only where its number is there already.
    """
    number = policy.number
    folder = run_dir / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final = run_dir / _path_of(policy)
    # A name that no other process has: two trainers never write to the same files.
    unfinished = folder / _unfinished(number)
    shutil.rmtree(unfinished, ignore_errors=True)
    if final.exists() and digest_in(final) == policy.digest:
        return
    unfinished.mkdir()
    link_model_files(model_files_from, unfinished)
    if policy.adapter is not None:
        # Beside one, transformers would look for whole weights here, and not for the base.
        (unfinished / _MODEL_CONFIG).unlink(missing_ok=True)
    write_weights(unfinished, policy.data)
    sync(unfinished)
    with fence():
        # The order counts: all is on disk before the rename makes it visible.
        _discard(final)
        unfinished.rename(final)
        sync(folder)


class DirectoryReader:
    """A generator's end of the transport: the trainer's run directory, which it can read."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    @property
    def where(self) -> str:
        """The folder."""
        return f"in {self._run_dir / _FOLDER}"

    def parts(self) -> list[WeightPart]:
        """The model directories and the deltas that are there."""
        return self._directories() + self._bases() + self._deltas()

    def _directories(self) -> list[WeightPart]:
        found = []
        for path in (self._run_dir / _FOLDER).glob("[0-9]*"):
            weights = weights_place(path) if path.name.isdecimal() else None
            if weights is not None:
                file, size = weights
                # The digest is in no name, and computing it would read the whole file.
                place = f"{_FOLDER}/{path.name}/{file}"
                note = note_in(path)
                base = VersionId(BASE, note.base) if note else None
                found.append(WeightPart(int(path.name), "", size, place, base))
        return found

    def _bases(self) -> list[WeightPart]:
        """The full sets that adapters belong to."""
        found = []
        for path in (self._run_dir / _FOLDER).glob(f"{BASE_PREFIX}*"):
            weights = weights_place(path)
            if weights is not None:
                file, size = weights
                digest = path.name.removeprefix(BASE_PREFIX)
                found.append(WeightPart(BASE, digest, size, f"{_FOLDER}/{path.name}/{file}"))
        return found

    def _deltas(self) -> list[WeightPart]:
        found = []
        for path in (self._run_dir / _DELTAS).glob("[0-9]*"):
            name = _DELTA.fullmatch(path.name)
            size = _size(path)
            if name is None or size is None:
                continue
            number, digest, base_number, base_digest = name.groups()
            base = VersionId(int(base_number), base_digest)
            place = f"{_DELTAS}/{path.name}"
            found.append(WeightPart(int(number), digest, size, place, base))
        return found

    def read(self, part: WeightPart) -> Bytes:
        """The bytes of `part` as one file.

        Raises:
            WeightsError: it is gone, or damaged.
        """
        path = self._run_dir / part.place
        try:
            return read_weights(path)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"version {part.number} cannot be read from {path}: {error}"
            ) from error


class DirectoryWriter(DirectoryReader):
    """The trainer's end of the transport.

    A full set is a model directory, with the files of `model_files` in it. What others see changes
    inside `fence` alone, which raises in a trainer whose lease has passed to another one.
    """

    def __init__(self, run_dir: Path, model_files: Path, fence: Fence = nullcontext) -> None:
        super().__init__(run_dir)
        self._model_files = model_files
        self._fence = fence

    def room_bytes(self) -> float:
        """No bound but the disk's."""
        return math.inf

    def put_whole(self, policy: LoadedPolicy) -> WeightPart:
        """Write a model directory.

        Raises:
            OSError: it cannot be written.
        """
        write_directory(self._run_dir, policy, self._model_files, self._fence)
        path = _path_of(policy)
        written = weights_place(self._run_dir / path)
        assert written is not None
        return WeightPart.of(policy, f"{path}/{written[0]}")

    def put_delta(self, part: WeightPart, data: Bytes) -> WeightPart:
        """Write a delta's file.

        Raises:
            OSError: it cannot be written.
        """
        base = part.base
        assert base is not None, "a delta"
        name = f"{part.number:06d}-{part.digest}-on-{base.number:06d}-{base.digest}.safetensors"
        place = f"{_DELTAS}/{name}"
        path = self._run_dir / place
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(_unfinished(part.number))
        _write_synced(unfinished, data)
        # A trainer that went back to a checkpoint may find other weights under this number.
        directory = self._run_dir / _path(part.number)
        replaced = directory.exists() and digest_in(directory) != part.digest
        with self._fence():
            unfinished.rename(path)
            sync(path.parent)
            if replaced:
                _discard(directory)
        return msgspec.structs.replace(part, place=place)

    def keep(self, parts: Collection[WeightPart]) -> None:
        """Remove the deltas that are not among `parts`.

        Model directories serve others too (evaluations, exports); `prune` removes those.
        """
        places = {part.place for part in parts}
        with self._fence():
            for part in self._deltas():
                if part.place not in places:
                    (self._run_dir / part.place).unlink(missing_ok=True)


def prune(run_dir: Path, keep: int, pinned: Collection[int] = ()) -> list[int]:
    """Remove model directories but the `keep` newest and the `pinned` ones.

    Also removes what a crash left unfinished. For a pinned version that exists as deltas only, the
    directory that they start from stays. Returns the numbers removed.
    """
    folder = run_dir / _FOLDER
    if not folder.is_dir():
        return []
    for left in [*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_REMOVED}*")]:
        # A trainer that is superseded may be writing still; the next prune removes the rest.
        shutil.rmtree(left, ignore_errors=True)
    for unfinished in (run_dir / _DELTAS).glob(f"{_UNFINISHED}*"):
        unfinished.unlink(missing_ok=True)
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    needed = {_newest_up_to(number, numbers) for number in pinned}
    old = numbers[: max(0, len(numbers) - keep)]
    removed = [number for number in old if number not in needed]
    for number in removed:
        _discard(folder / f"{number:06d}")
    return removed


def _newest_up_to(number: int, numbers: Collection[int]) -> int:
    return max((one for one in numbers if one <= number), default=number)


def _unfinished(number: int) -> str:
    return f"{_UNFINISHED}{number:06d}-{socket.gethostname()}-{os.getpid()}"


def _path_of(policy: LoadedPolicy) -> str:
    if policy.number == BASE:
        return str(base_directory(Path(_FOLDER), policy.digest))
    return _path(policy.number)


def _path(number: int) -> str:
    return f"{_FOLDER}/{number:06d}"


def _write_synced(path: Path, data: Bytes) -> None:
    path.write_bytes(data.data)
    sync(path)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # pruned since its directory was listed
        return None


def link_model_files(source: Path, target: Path) -> None:
    """Put a model directory's files, all but weights of any format, into `target`.

    By links: writing them would cost more than writing the weights of a small model.
    """
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.endswith(_NOT_LINKED):
            continue
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target / path.name)
            sync(target / path.name)


def _discard(path: Path) -> None:
    """Remove a directory.

    It is renamed first: a crash on the way then leaves no version with half its files.
    """
    if path.exists():
        doomed = path.with_name(_REMOVED + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def pin(run_dir: Path, version: int, use: str) -> bool:
    """Keep `version` for `use` until it is unpinned; False if it was pinned for that already."""
    path = _pin_file(run_dir, version, use)
    path.parent.mkdir(exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def unpin(run_dir: Path, version: int, use: str) -> None:
    """Say that `use` no longer needs `version`."""
    _pin_file(run_dir, version, use).unlink(missing_ok=True)


def pins(run_dir: Path) -> set[tuple[int, str]]:
    """Every pinned version, with its use."""
    names = [path.name.partition(".") for path in (run_dir / _PINNED).glob("[0-9]*.*")]
    return {(int(version), use) for version, _, use in names}


def pinned(run_dir: Path) -> set[int]:
    """Every pinned version."""
    return {version for version, _ in pins(run_dir)}


def _pin_file(run_dir: Path, version: int, use: str) -> Path:
    return run_dir / _PINNED / f"{version:06d}.{use}"
