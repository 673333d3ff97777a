"""Checkpoints are whole or absent, and damage shows."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from onstream.pipeline.records import PolicyVersion
from onstream.workers.trainer.durability.checkpoint import (
    CheckpointError,
    TrainerState,
    damage,
    load_newest,
    prune,
    save,
)


def state(step: int) -> TrainerState:
    return TrainerState(
        sequence=step,
        step=step,
        policy=PolicyVersion(step, "digest", f"policies/{step:06d}", 7),
        issued=8 * step,
        settled={"trained": [(1, 7)], "dead": [(8, 8)]},
        before=[(1, 4)],
        ledger_bytes=99,
        totals={"rollouts": 7},
    )


def write(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "optimizer.pt").write_bytes(b"moments")
    (path / "nested").mkdir()
    (path / "nested/template.jinja").write_bytes(b"words")


def nothing() -> AbstractContextManager[None]:
    """A fence that lets everybody pass."""
    return nullcontext()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = save(tmp_path, state(20), write, nothing)
    assert saved.path == tmp_path / "step-000020"
    assert names(saved.path) == [
        "manifest.json",
        "model.safetensors",
        "nested",
        "optimizer.pt",
        "trainer.json",
    ]
    assert load_newest(tmp_path) == saved
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert sorted(manifest) == [
        "model.safetensors",
        "nested/template.jinja",
        "optimizer.pt",
        "trainer.json",
    ]


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None


def test_a_second_checkpoint_of_a_step_stands_beside_the_first_and_is_the_newer(
    tmp_path: Path,
) -> None:
    save(tmp_path, state(20), write, nothing)
    second = save(tmp_path, state(20), write, nothing)
    assert second.path.name == "step-000020.1"
    assert load_newest(tmp_path) == second


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_names_the_reason(
    tmp_path: Path,
) -> None:
    def fails(path: Path) -> None:
        write(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    first = save(tmp_path, state(1), write, nothing)
    with pytest.raises(
        CheckpointError,
        match=r"step-000002 could not be written \(.*No space left on device\); \d+ MiB are free",
    ):
        save(tmp_path, state(2), fails, nothing)
    assert names(tmp_path) == ["step-000001"]
    assert load_newest(tmp_path) == first


def test_a_checkpoint_whose_writer_lost_its_lease_never_gets_its_name(tmp_path: Path) -> None:
    def lost() -> AbstractContextManager[None]:
        raise PermissionError("another trainer took over")

    with pytest.raises(PermissionError):
        save(tmp_path, state(1), write, lost)
    assert load_newest(tmp_path) is None
    prune(tmp_path, keep=2, keep_every=None)
    assert names(tmp_path) == []


@dataclass
class Damage:
    do: Callable[[Path], object]
    words: str


@pytest.mark.parametrize(
    "harm",
    [
        Damage(
            lambda path: (path / "model.safetensors").write_bytes(b"weight"),
            "model.safetensors does not have the digest",
        ),
        Damage(lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        Damage(
            lambda path: (path / "nested/template.jinja").write_bytes(b""),
            "nested/template.jinja does not have the digest",
        ),
        Damage(
            lambda path: (path / "trainer.json").write_bytes(b"{}"),
            "trainer.json does not have the digest",
        ),
        Damage(
            lambda path: (path / "manifest.json").write_bytes(b"{"), "no readable manifest.json"
        ),
        Damage(lambda path: (path / "manifest.json").unlink(), "no readable manifest.json"),
        Damage(
            lambda path: (path / "manifest.json").write_bytes(b"{}"),
            "trainer.json is not in its manifest",
        ),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_the_newest(
    tmp_path: Path, harm: Damage
) -> None:
    first = save(tmp_path, state(1), write, nothing)
    second = save(tmp_path, state(2), write, nothing)
    harm.do(second.path)
    assert harm.words in (damage(second.path) or "whole")
    assert load_newest(tmp_path) == first
    assert names(tmp_path) == ["step-000001", "torn-step-000002"]


def test_old_checkpoints_go_but_for_those_kept_for_good_which_lose_their_optimizer(
    tmp_path: Path,
) -> None:
    for step in range(1, 8):
        save(tmp_path, state(step), write, nothing)
    prune(tmp_path, keep=2, keep_every=3)
    assert names(tmp_path) == ["step-000003", "step-000006", "step-000007"]
    assert not (tmp_path / "step-000003/optimizer.pt").exists()
    assert damage(tmp_path / "step-000003") is None
    assert (tmp_path / "step-000006/optimizer.pt").exists()
    prune(tmp_path, keep=2, keep_every=3)
    assert names(tmp_path) == ["step-000003", "step-000006", "step-000007"]


def test_no_trainer_resumes_from_a_checkpoint_without_its_optimizer(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step), write, nothing)
    prune(tmp_path, keep=2, keep_every=1)
    for step in (2, 3):
        (tmp_path / f"step-00000{step}/manifest.json").unlink()
    assert load_newest(tmp_path) is None
    assert names(tmp_path) == ["step-000001", "torn-step-000002", "torn-step-000003"]
