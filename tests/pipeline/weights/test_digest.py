"""A version's digest is of its tensors: the same in one file and in many, and told apart from the
digests that earlier versions of Onstream made.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

from onstream.pipeline.weights import LoadedPolicy, WeightsError, digest
from onstream.pipeline.weights.digest import file_digest, is_of_file, tree_digest
from onstream.pipeline.weights.file_format import layout_of

STATE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}


def test_the_digest_is_a_tree_over_name_dtype_shape_and_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digest, "PIECE_BYTES", 16)
    data = STATE["w"].numpy().tobytes()
    half = STATE["half"].view(torch.int16).numpy().tobytes()
    leaves = [
        ["half", "bfloat16", [2], [hashlib.sha256(half).hexdigest()]],
        ["none", "float32", [0, 4], []],
        [
            "w",
            "float32",
            [2, 3],
            [hashlib.sha256(data[:16]).hexdigest(), hashlib.sha256(data[16:]).hexdigest()],
        ],
    ]
    root = hashlib.sha256(json.dumps(leaves, separators=(",", ":")).encode()).hexdigest()
    assert LoadedPolicy.of(1, STATE).digest == f"{root}-tree1"


def test_it_says_nothing_of_files_nor_of_the_order_in_them() -> None:
    whole = LoadedPolicy.of(1, STATE)
    parts = [
        LoadedPolicy.of(1, {name: STATE[name] for name in names}).data
        for names in (["w"], ["none", "half"])
    ]
    assert tree_digest(*((data, layout_of(data)) for data in parts)) == whole.digest


@pytest.mark.parametrize(
    "other",
    [
        {"v": STATE["w"], "half": STATE["half"], "none": STATE["none"]},
        {**STATE, "w": STATE["w"].reshape(3, 2)},
        {**STATE, "w": STATE["w"].view(torch.int32)},
        {**STATE, "w": STATE["w"] + 1},
        {**STATE, "none": torch.empty(4, 0)},
    ],
    ids=["name", "shape", "dtype", "bytes", "shape of nothing"],
)
def test_whatever_differs_shows(other: dict[str, torch.Tensor]) -> None:
    assert LoadedPolicy.of(1, other).digest != LoadedPolicy.of(1, STATE).digest


def test_threads_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = LoadedPolicy.of(1, STATE).digest
    monkeypatch.setattr(digest, "_ALONE_BYTES", 0)
    assert LoadedPolicy.of(1, STATE).digest == alone


def test_a_digest_of_an_earlier_version_is_known_for_what_it_is() -> None:
    policy = LoadedPolicy.of(3, STATE)
    before = hashlib.sha256(save(STATE, metadata={"format": "pt"})).hexdigest()
    assert file_digest(policy.data) == before
    assert is_of_file(before) and not is_of_file(policy.digest)
    assert policy.has_digest(before) and policy.has_digest(policy.digest)
    assert not policy.has_digest("0" * 64)
    with pytest.raises(WeightsError, match=r"earlier versions of Onstream .* announces"):
        LoadedPolicy(3, before, policy.data)


def test_weights_are_hashed_once_when_they_are_published_and_once_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed = list[int]()
    sha256 = hashlib.sha256

    def counted(data: bytes = b"") -> object:
        hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", counted)
    weights = torch.ones(1 << 14)
    policy = LoadedPolicy.of(1, {"w": weights})
    assert hashed.count(weights.nbytes) == 1 and sum(hashed) < weights.nbytes + 1000
    hashed.clear()
    LoadedPolicy(1, policy.digest, policy.data)
    assert hashed.count(weights.nbytes) == 1 and sum(hashed) < weights.nbytes + 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_needs_no_copy_but_the_published_one(dtype: torch.dtype) -> None:
    shared = torch.arange(64.0)
    state = {"embed": shared, "head": shared, "steps": torch.tensor([3.0])}
    first = LoadedPolicy.of(1, state, dtype)
    memory = first.data.ctypes.data
    expected = {name: state[name].to(dtype) for name in ("embed", "steps")}
    assert first.data.tobytes() == save(expected, metadata={"format": "pt"})
    shared += 1
    again = LoadedPolicy.of(2, state, dtype, into=first.data)
    assert again.data.ctypes.data == memory
    assert torch.equal(again.tensors()["embed"], shared.to(dtype))
    other = LoadedPolicy.of(3, {"w": shared}, dtype, into=np.zeros(5, dtype=np.uint8))
    assert torch.equal(other.tensors()["w"], shared.to(dtype))
