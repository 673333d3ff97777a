"""Weights on disk are standard files: one, or several with an index that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from onstream.pipeline.weights import (
    DirectoryReader,
    LoadedPolicy,
    PolicyFetcher,
    WeightsError,
    publish,
    shards,
)

STATE = {
    "a": torch.arange(32.0),
    "b": torch.arange(16.0).reshape(4, 4),
    "c": torch.ones(8, dtype=torch.bfloat16),
    "d": torch.tensor([True, False]),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_more_than_a_shard_is_several_files_with_an_index(tmp_path: Path, model_dir: Path) -> None:
    policy = publish(tmp_path, 4, STATE, model_dir)
    directory = tmp_path / policy.path
    files = [f"model-0000{place}-of-00002.safetensors" for place in (1, 2)]
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        *files,
        "model.safetensors.index.json",
    ]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": files[0], "b": files[1], "c": files[1], "d": files[1]}
    assert index["metadata"]["total_size"] == 128 + 64 + 16 + 2
    loaded = {**load_file(directory / files[0]), **load_file(directory / files[1])}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


def test_a_reader_gets_the_same_bytes_and_digest_as_from_one_file(
    tmp_path: Path, model_dir: Path
) -> None:
    policy = publish(tmp_path, 4, STATE, model_dir)
    fetched = PolicyFetcher(DirectoryReader(tmp_path), deltas=False).fetch(policy)
    whole = LoadedPolicy.of(4, STATE)
    assert policy.digest == fetched.digest == whole.digest
    assert fetched.data.tobytes() == whole.data.tobytes()


def test_publishing_the_same_weights_again_changes_nothing(tmp_path: Path, model_dir: Path) -> None:
    policy = publish(tmp_path, 4, STATE, model_dir)
    inode = (tmp_path / policy.path).stat().st_ino
    assert publish(tmp_path, 4, STATE, model_dir) == policy
    assert (tmp_path / policy.path).stat().st_ino == inode


@pytest.mark.parametrize("damage", ["a shard gone", "a byte other", "cut short", "no index"])
def test_damaged_shards_are_never_loaded_and_are_replaced(
    tmp_path: Path, model_dir: Path, damage: str
) -> None:
    policy = publish(tmp_path, 4, STATE, model_dir)
    shard = tmp_path / policy.path / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    if damage == "a shard gone":
        shard.unlink()
    elif damage == "no index":
        (tmp_path / policy.path / shards.INDEX_FILE).write_text("[]")
    else:
        shard.write_bytes(data[:-4] if damage == "cut short" else data[:-1] + bytes([data[-1] ^ 1]))
    reader = PolicyFetcher(DirectoryReader(tmp_path), deltas=False)
    with pytest.raises(WeightsError):
        reader.fetch(policy)
    assert publish(tmp_path, 4, STATE, model_dir) == policy
    assert reader.fetch(policy).digest == policy.digest


def test_transformers_loads_a_version_of_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(shards, "SHARD_BYTES", 4_000)
    policy = publish(tmp_path, 1, model.state_dict(), tmp_path / "model")
    assert len(list((tmp_path / policy.path).glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / policy.path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
