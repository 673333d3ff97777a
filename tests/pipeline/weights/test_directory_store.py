"""A version is published whole, read only if it is what was announced, and pruned without leaving
halves.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import onstream.pipeline.weights.directory_store
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import (
    DirectoryReader,
    PolicyFetcher,
    WeightsError,
    digest,
    prune,
    publish,
)
from tests.waiting import LONGEST_S

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model directory with configuration, tokenizer and weights of several kinds."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
    ):
        (directory / name).write_text(name)
    return directory


def folder_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "policies").iterdir())


def read(run_dir: Path, policy: PolicyVersion) -> dict[str, torch.Tensor]:
    return PolicyFetcher(DirectoryReader(run_dir), deltas=False).fetch(policy).tensors()


def test_a_published_version_is_read_back_as_it_was(tmp_path: Path, model_dir: Path) -> None:
    policy = publish(tmp_path, 7, STATE, model_dir)
    assert (policy.number, policy.path) == (7, "policies/000007")
    assert policy.size_bytes == (tmp_path / "policies/000007/model.safetensors").stat().st_size
    found = read(tmp_path, policy)
    assert found.keys() == STATE.keys()
    assert all(
        torch.equal(found[name], STATE[name]) and found[name].dtype == STATE[name].dtype
        for name in STATE
    )


def test_a_version_holds_the_models_other_files_and_no_weights_but_its_own(
    tmp_path: Path, model_dir: Path
) -> None:
    publish(tmp_path, 0, STATE, model_dir)
    names = sorted(path.name for path in (tmp_path / "policies/000000").iterdir())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(tmp_path / "policies/000000/model.safetensors").keys() == STATE.keys()


def test_publishing_the_same_weights_again_changes_nothing(tmp_path: Path, model_dir: Path) -> None:
    first = publish(tmp_path, 3, STATE, model_dir)
    inode = (tmp_path / first.path).stat().st_ino
    assert publish(tmp_path, 3, STATE, model_dir) == first
    assert (tmp_path / first.path).stat().st_ino == inode
    assert folder_names(tmp_path) == ["000003"]


def test_other_weights_under_the_same_number_replace_it_and_the_old_announcement_is_refused(
    tmp_path: Path, model_dir: Path
) -> None:
    old = publish(tmp_path, 3, STATE, model_dir)
    new = publish(tmp_path, 3, {"a": torch.zeros(2)}, model_dir)
    assert new.digest != old.digest
    assert torch.equal(read(tmp_path, new)["a"], torch.zeros(2))
    with pytest.raises(WeightsError, match="announced with"):
        read(tmp_path, old)
    assert folder_names(tmp_path) == ["000003"]


def test_tensors_that_share_memory_are_written_once(tmp_path: Path, model_dir: Path) -> None:
    shared = torch.ones(3, 2)
    policy = publish(tmp_path, 0, {"embed": shared, "head": shared, "view": shared[:1]}, model_dir)
    assert sorted(read(tmp_path, policy)) == ["embed", "view"]


@pytest.mark.parametrize("damage", ["cut short", "one byte other", "missing"])
def test_damaged_weights_are_never_loaded(tmp_path: Path, model_dir: Path, damage: str) -> None:
    policy = publish(tmp_path, 1, STATE, model_dir)
    path = tmp_path / policy.path / "model.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-4] if damage == "cut short" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WeightsError):
        read(tmp_path, policy)


def test_bytes_that_are_no_safetensors_are_a_weights_error_even_under_their_own_digest(
    tmp_path: Path,
) -> None:
    import hashlib

    directory = tmp_path / "policies/000001"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"not tensors")
    policy = PolicyVersion(1, hashlib.sha256(b"not tensors").hexdigest(), "policies/000001", 11)
    with pytest.raises(WeightsError, match="version 1 cannot be read"):
        read(tmp_path, policy)


def test_what_was_checked_is_what_is_loaded_even_if_the_file_is_replaced_meanwhile(
    tmp_path: Path, model_dir: Path
) -> None:
    loaded = PolicyFetcher(DirectoryReader(tmp_path), deltas=False).fetch(
        publish(tmp_path, 1, STATE, model_dir)
    )
    (tmp_path / "policies/000001/model.safetensors").write_bytes(b"")
    publish(tmp_path, 1, {"a": torch.zeros(1)}, model_dir)
    assert torch.equal(loaded.tensors()["a"], STATE["a"])


@pytest.mark.parametrize("killed_at", ["link_model_files", "sync", "_discard"])
def test_a_crash_while_publishing_leaves_no_version_and_the_next_attempt_succeeds(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(onstream.pipeline.weights.directory_store, killed_at, die)
        publish(tmp_path, 5, STATE, model_dir)
    assert not (tmp_path / "policies/000005").exists()
    policy = publish(tmp_path, 5, STATE, model_dir)
    assert read(tmp_path, policy).keys() == STATE.keys()
    assert folder_names(tmp_path) == ["000005"]


def test_the_digest_of_a_new_version_is_computed_while_it_is_written(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    sha256 = digest._sha256
    write = onstream.pipeline.weights.directory_store.write_weights

    def hashed(piece: memoryview) -> str:
        assert written.wait(LONGEST_S)
        return sha256(piece)

    def noted(*args: Any) -> None:
        write(*args)
        written.set()

    monkeypatch.setattr(digest, "_ALONE_BYTES", 0)
    monkeypatch.setattr(digest, "_sha256", hashed)
    monkeypatch.setattr(onstream.pipeline.weights.directory_store, "write_weights", noted)
    policy = publish(tmp_path, 4, STATE, model_dir)
    assert read(tmp_path, policy).keys() == STATE.keys()


@pytest.mark.parametrize("links", [True, False])
def test_everything_written_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    events: list[str] = []
    fsync = os.fsync
    rename = Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    def no_links(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(Path, "rename", noted_rename)
    publish(tmp_path, 2, STATE, model_dir)
    before = events[: events.index("rename")]
    after = events[events.index("rename") + 1 :]
    copies = set() if links else {"config.json", "tokenizer.json", "chat_template.jinja"}
    unfinished = f".unfinished-000002-{socket.gethostname()}-{os.getpid()}"
    assert set(before) == {*copies, "model.safetensors", unfinished}
    assert (tmp_path / "policies/000002/tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "policies/000002/tokenizer.json").samefile(
        model_dir / "tokenizer.json"
    ) == links
    assert after == ["policies"]


def test_pruning_keeps_the_newest_and_the_pinned_and_clears_what_crashes_left(
    tmp_path: Path, model_dir: Path
) -> None:
    for number in range(6):
        publish(tmp_path, number, STATE, model_dir)
    (tmp_path / "policies/.unfinished-000006").mkdir()
    (tmp_path / "policies/.removed-000000").mkdir()
    assert prune(tmp_path, keep=2, pinned={1}) == [0, 2, 3]
    assert folder_names(tmp_path) == ["000001", "000004", "000005"]
    assert prune(tmp_path, keep=2, pinned={1}) == []


def test_pruning_a_run_that_has_published_nothing_removes_nothing(tmp_path: Path) -> None:
    assert prune(tmp_path, keep=2) == []
