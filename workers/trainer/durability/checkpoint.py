"""Checkpoints: written whole or not at all, checked by digest when read.

A checkpoint is a Hugging Face directory that any `AutoModelForCausalLM` loads, with the optimizer's
state, `trainer.json` (what the trainer has to know to go on) and `manifest.json` (the SHA-256 of
every file). It is written beside its place, synced and renamed, so a kill leaves either the whole
checkpoint or none; what a disk tears later, the digests show.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.run_files.durable import digest_of, sync
from onstream.pipeline.run_files.ledger import Fate
from onstream.pipeline.run_files.recording import JournalMark
from onstream.pipeline.telemetry import get_logger
from onstream.settings.decoding import UNDECODABLE

FOLDER = "checkpoints"
STATE = "trainer.json"
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.pt"
_NAME = re.compile(r"^step-(\d{6,})(?:\.(\d+))?$")
_TEMPORARY = ".writing-"
_TORN = "torn-"

log = get_logger()


class CheckpointError(Exception):
    """A checkpoint could not be written; the ones before it stand."""


class TrainerState(msgspec.Struct, frozen=True):
    """`trainer.json`: what the trainer has to know to go on.

    `settled` holds every settled number as ranges, by fate; `before` those that the checkpoint
    before this one held: their entries may be acknowledged. `requeued` gives the dead number for
    each number that was issued in place of one. `dropped` counts what was dropped since the last
    step, by fate. `recorded` is the length of the recording in bytes, where there is one.
    `ledger_digest` is the SHA-256 of the first `ledger_bytes` of the ledger, and `journal` says
    what to take again from the run's journal; both are None in a checkpoint of an earlier version.
    """

    sequence: int
    step: int
    policy: PolicyVersion
    issued: int
    settled: dict[Fate, list[tuple[int, int]]]
    before: list[tuple[int, int]]
    ledger_bytes: int
    totals: dict[str, float]
    requeued: dict[int, int] = {}
    dropped: dict[str, int] = {}
    recorded: int | None = None
    ledger_digest: str | None = None
    journal: JournalMark | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: TrainerState


def save(
    directory: Path,
    state: TrainerState,
    write_files: Callable[[Path], None],
    fence: Callable[[], AbstractContextManager[None]],
) -> Checkpoint:
    """Write the checkpoint of `state` under `directory` and make it durable.

    `write_files` puts the model, tokenizer and optimizer files into the directory it is given. The
    checkpoint gets its own name inside `fence`, which raises in a trainer whose lease has passed to
    another one. Until then it lies under a name that no other process has, so two trainers never
    write to the same files.

    Raises:
        CheckpointError: it could not be written (a full disk, say); nothing is left of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = _free_name(directory, state.step)
    temporary = directory / f"{_TEMPORARY}{path.name}-{socket.gethostname()}-{os.getpid()}"
    try:
        _write(temporary, state, write_files)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch: a full disk is a RuntimeError
        free_mib = shutil.disk_usage(directory).free >> 20
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {path} could not be written ({error}); {free_mib} MiB are free on its disk"
        ) from error
    with fence():
        os.rename(temporary, path)
        sync(directory)
    return Checkpoint(path, state)


def load_newest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `directory`; None where there is none.

    Torn ones are set aside as `torn-…`, with an error in the log.
    """
    for path in _newest_first(directory):
        if problem := damage(path):
            _set_aside(path, problem)
        elif (path / OPTIMIZER).exists():
            return _read(path)
    return None


def complete(directory: Path) -> list[Checkpoint]:
    """The checkpoints under `directory` that a trainer could resume from, the newest first.

    Their digests are not checked.
    """
    return [
        _read(path)
        for path in _newest_first(directory)
        if (path / OPTIMIZER).exists() and (path / MANIFEST).exists()
    ]


def torn(directory: Path) -> list[Path]:
    """The checkpoints under `directory` that were set aside as torn."""
    return sorted(directory.glob(f"{_TORN}step-*"))


def by_step(directory: Path) -> dict[int, Path]:
    """The newest checkpoint of each step under `directory`. Their digests are not checked."""
    return {_order(path)[0]: path for path in reversed(_newest_first(directory))}


def damage(path: Path) -> str | None:
    """What differs between the checkpoint `path` and its manifest, or None for a whole one."""
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=dict[str, str])
    except (OSError, *UNDECODABLE) as error:
        return f"no readable {MANIFEST}: {error}"
    if STATE not in manifest:
        return f"{STATE} is not in its manifest"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest_of(path / name) != digest:
            return f"{name} does not have the digest that the manifest gives"
    return None


def prune(
    directory: Path, keep: int, keep_every: int | None, *, keep_optimizer: bool = False
) -> None:
    """Remove all but the newest `keep` checkpoints, and what is left of unfinished ones.

    Checkpoints of steps that divide by `keep_every` stay for good, without their optimizer's state
    unless `keep_optimizer`.
    """
    for path in _newest_first(directory)[keep:]:
        if keep_every is None or _order(path)[0] % keep_every:
            shutil.rmtree(path)
        elif not keep_optimizer and (path / OPTIMIZER).exists():
            _forget_optimizer(path)
    for unfinished in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(unfinished)


def _write(temporary: Path, state: TrainerState, write_files: Callable[[Path], None]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_files(temporary)
    (temporary / STATE).write_bytes(msgspec.json.encode(state))
    files = [path for path in temporary.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(temporary).as_posix() for path in files)
    manifest = {name: digest_of(temporary / name) for name in names}
    (temporary / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    sync_tree(temporary)


def _read(path: Path) -> Checkpoint:
    state = msgspec.json.decode((path / STATE).read_bytes(), type=TrainerState)
    return Checkpoint(path, state)


def _set_aside(path: Path, problem: str) -> None:
    """Rename a torn checkpoint: retention would count it among the newest."""
    aside = path.with_name(f"{_TORN}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    log.error(
        "checkpoint is torn; the one before it is used",
        checkpoint=str(path),
        problem=problem,
        kept_as=str(aside),
    )


def sync_tree(directory: Path) -> None:
    """Make `directory` and all in it durable."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def _forget_optimizer(path: Path) -> None:
    """Take the optimizer's state out of a checkpoint: the manifest first, which stays true."""
    manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=dict[str, str])
    manifest.pop(OPTIMIZER, None)
    fresh = path / f"{MANIFEST}.new"
    fresh.write_bytes(msgspec.json.encode(manifest))
    fresh.rename(path / MANIFEST)
    (path / OPTIMIZER).unlink()


def _free_name(directory: Path, step: int) -> Path:
    """`step-000020`, or `step-000020.1` where that exists: numbers may settle without a step."""
    counters = [_order(path)[1] for path in _newest_first(directory) if _order(path)[0] == step]
    if not counters:
        return directory / f"step-{step:06d}"
    return directory / f"step-{step:06d}.{max(counters) + 1}"


def _newest_first(directory: Path) -> list[Path]:
    found: Iterator[Path] = directory.glob("step-*") if directory.is_dir() else iter(())
    return sorted((path for path in found if _NAME.match(path.name)), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.match(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)
