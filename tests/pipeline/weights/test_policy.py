"""A policy in memory is what its digest says, gives its tensors without copying them, and its file
to others for as long as it lives.
"""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from onstream.pipeline.weights import LoadedPolicy, WeightsError, read_file

STATE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.25),
    "none": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
    "count": torch.tensor([7], dtype=torch.int64),
}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def checked(data: bytes) -> LoadedPolicy:
    return LoadedPolicy(
        3, hashlib.sha256(data).hexdigest(), np.frombuffer(bytearray(data), dtype=np.uint8)
    )


def test_tensors_of_every_shape_and_kind_come_out_as_they_went_in() -> None:
    policy = LoadedPolicy.of(4, STATE)
    assert policy.number == 4
    assert same(policy.tensors(), STATE)


def test_tensors_share_the_memory_of_the_policy() -> None:
    policy = LoadedPolicy.of(4, STATE)
    assert policy.tensors()["w"].data_ptr() == policy.data.ctypes.data + policy.layout["w"].start


def test_the_file_can_be_read_by_others_and_goes_with_the_policy() -> None:
    policy = LoadedPolicy.of(4, STATE)
    path = policy.file()
    assert path == policy.file()
    assert [one.name for one in path.parent.iterdir()] == ["model.safetensors"]
    assert same(load_file(path), STATE)
    assert path.read_bytes() == policy.data.tobytes()
    del policy
    gc.collect()
    assert not path.parent.exists()


def test_bytes_of_another_digest_are_refused() -> None:
    with pytest.raises(WeightsError, match="announced with 000000000000"):
        LoadedPolicy(3, "0" * 64, LoadedPolicy.of(3, STATE).data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"\xff" * 64,
        save(STATE)[:-1],
        (2).to_bytes(8, "little") + b"[]",
        save({"unusual": torch.zeros(2, dtype=torch.complex64)}),
    ],
    ids=["empty", "no header", "no json", "cut short", "no object", "complex numbers"],
)
def test_bytes_that_are_no_weights_are_refused_even_under_their_own_digest(data: bytes) -> None:
    with pytest.raises(WeightsError, match=r"version 3 cannot be read: .* no safetensors file"):
        checked(data)


def test_a_file_is_read_if_it_is_what_was_announced(tmp_path: Path) -> None:
    policy = LoadedPolicy.of(3, STATE)
    assert same(read_file(policy.file(), policy.digest), STATE)
    damaged = tmp_path / "damaged"
    whole = policy.data.tobytes()
    for data, words in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "announced with"),
        (whole[:-1], "cannot be read"),
        (b"", "cannot be read"),
    ):
        damaged.write_bytes(data)
        with pytest.raises(WeightsError, match=words):
            read_file(damaged, policy.digest)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_file(tmp_path / "missing", policy.digest)
