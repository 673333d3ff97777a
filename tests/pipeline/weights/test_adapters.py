"""A version that is an adapter: readers make of it, bit for bit, what it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from onstream.pipeline.errors import UserError
from onstream.pipeline.weights import (
    LoadedPolicy,
    LowRank,
    PolicyFetcher,
    PolicyPacker,
    PolicySender,
    StoreWriter,
    WeightsError,
    WeightSum,
    announced,
)
from onstream.pipeline.weights.adapter import ADAPTER_FILE, base_directory
from onstream.pipeline.weights.digest import is_of_adapter
from onstream.pipeline.weights.merging import is_adapter, model_directory, write_whole
from tests.pipeline.weights.policies import Transport

RANK = 3
PEFT = {"peft_type": "LORA", "base_model_name_or_path": "a/model"}


class AdaptedModel:
    """Weights of which two are adapted: `q`, and `c`, which is kept transposed. A head is tied."""

    def __init__(self, dtype: torch.dtype, *, seed: int = 0, scaling: float = 1.7) -> None:
        self.dtype = dtype
        self.draw = torch.Generator().manual_seed(seed)
        embed = self.random(300, 64).to(dtype)
        self.weights = {
            "embed.weight": embed,
            "head.weight": embed,
            "norm.weight": self.random(64),
            "steps": torch.arange(3),
        }
        self.sums = {
            "layers.0.q.weight": self.adapted(96, 64, scaling, transposed=False),
            "layers.0.c.weight": self.adapted(64, 96, 2.0, transposed=True),
        }
        self.packer = PolicyPacker(dtype, json.dumps(PEFT))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw)

    def adapted(self, rows: int, columns: int, scaling: float, *, transposed: bool) -> WeightSum:
        outer, inner = (columns, rows) if transposed else (rows, columns)
        factors = (self.random(RANK, inner), self.random(outer, RANK))
        base = self.random(rows, columns).to(self.dtype)
        return WeightSum(base, LowRank(*factors, scaling, transposed))

    def state(self) -> dict[str, torch.Tensor | WeightSum]:
        return {**self.weights, **self.sums}

    def step(self) -> None:
        for one in self.sums.values():
            assert isinstance(one.addition, LowRank)
            one.addition.b.add_(self.random(*one.addition.b.shape), alpha=0.1)

    def version(self, number: int) -> LoadedPolicy:
        return LoadedPolicy(number, None, self.packer.pack(self.state()))

    def whole(self, number: int) -> LoadedPolicy:
        """What the trainer would publish if it merged the adapter itself."""
        return LoadedPolicy.of(number, self.state(), self.dtype)

    def send(self, sender: PolicySender, number: int) -> LoadedPolicy:
        policy = self.version(number)
        sent = sender.send(policy, adapter_base=lambda: self.packer.base(self.state()))
        assert sent.update_bytes == policy.data.size
        return policy


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> AdaptedModel:
    return AdaptedModel(request.param)


def publish(transport: Transport, model: AdaptedModel, number: int = 1) -> LoadedPolicy:
    return model.send(transport.sender(None), number)


def assert_same(found: LoadedPolicy, wanted: LoadedPolicy) -> None:
    assert found.number == wanted.number
    assert np.array_equal(found.data, wanted.data)


def test_readers_that_keep_up_miss_some_or_join_late_merge_what_the_trainer_would_have_merged(
    transport: Transport, model: AdaptedModel
) -> None:
    sender = transport.sender(None)
    steady = transport.reader()
    behind = transport.reader()
    for number in range(6):
        policy = model.send(sender, number)
        assert is_of_adapter(policy.digest)
        whole = model.whole(number)
        assert_same(steady.fetch(announced(policy)), whole)
        if number:
            assert steady.fetched_bytes == policy.data.size < whole.data.size / 5
        if number in (1, 5):
            assert_same(behind.fetch(announced(policy)), whole)
        late = transport.reader()
        assert_same(late.fetch(announced(policy)), whole)
        assert late.fetched_bytes == policy.data.size + model.packer.base(model.state()).data.size
        model.step()


def test_a_tied_head_is_in_the_base_once_and_in_no_adapter(model: AdaptedModel) -> None:
    base = model.packer.base(model.state())
    assert "embed.weight" in base.shapes
    assert "head.weight" not in base.shapes
    layers = ("base_model.model.layers.0.c", "base_model.model.layers.0.q")
    assert sorted(model.version(1).shapes) == [
        f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"
    ]


def test_the_digest_is_of_the_factors_the_scaling_and_the_base() -> None:
    digests = {
        AdaptedModel(torch.float32).version(1).digest,
        AdaptedModel(torch.float32, scaling=2.0).version(1).digest,
        AdaptedModel(torch.float32, seed=1).version(1).digest,
    }
    assert len(digests) == 3
    other = AdaptedModel(torch.float32)
    assert other.version(2).digest in digests, "the number is no part of it"
    other.weights["norm.weight"] = other.weights["norm.weight"] + 1
    other.packer = PolicyPacker(torch.float32, json.dumps(PEFT))
    assert other.version(2).digest not in digests


@pytest.mark.parametrize("case", ["another sum", "a weight that is rounded", "no configuration"])
def test_what_two_factors_do_not_say_exactly_is_published_whole(case: str) -> None:
    model = AdaptedModel(torch.bfloat16)
    name = "layers.0.q.weight"
    if case == "another sum":
        model.sums[name] = WeightSum(model.sums[name].base, lambda: torch.ones(96, 64))
    elif case == "a weight that is rounded":
        model.sums[name] = WeightSum(model.random(96, 64), model.sums[name].addition)
    else:
        model.packer = PolicyPacker(torch.bfloat16, None)
    assert_same(model.version(4), model.whole(4))
    size = model.packer.size_bytes({"one": model.weights["norm.weight"]})
    assert size == 64 * 2


def test_an_adapter_that_is_not_what_was_announced_or_has_another_base_is_not_loaded(
    transport: Transport, model: AdaptedModel
) -> None:
    policy = publish(transport, model)
    reader = transport.reader()
    with pytest.raises(WeightsError, match="digest"):
        wrong = "0" * 64 + "-lora1"
        reader.fetch(replace(announced(policy), digest=wrong))
    model.step()
    later = publish(transport, model, 2)
    assert_same(reader.fetch(announced(later)), model.whole(2))


def test_a_damaged_base_is_not_loaded_and_one_that_is_gone_is_written_again(
    tmp_path: Path, model: AdaptedModel, bus: Any
) -> None:
    transport = Transport("filesystem", tmp_path, bus)
    policy = publish(transport, model)
    base = base_directory(tmp_path / "policies", model.packer.base(model.state()).digest)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(WeightsError, match="digest"):
        transport.reader().fetch(announced(policy))
    with pytest.raises(UserError, match="cannot be merged"):
        write_whole(tmp_path / "policies/000001", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    weights.unlink()
    with pytest.raises(WeightsError, match="no weights of version 1"):
        transport.reader().fetch(announced(policy))
    publish(transport, model, 2)
    assert weights.read_bytes() == whole
    assert_same(transport.reader().fetch(announced(policy)), model.whole(1))


def test_a_reader_whose_base_was_replaced_reads_the_new_one(transport: Transport) -> None:
    sender = transport.sender(None)
    reader = transport.reader()
    for number, seed in enumerate((0, 1, 0)):
        model = AdaptedModel(torch.float32, seed=seed)
        assert_same(reader.fetch(announced(model.send(sender, number))), model.whole(number))


def test_an_adapter_follows_whole_versions_of_a_run_that_an_earlier_version_began(
    transport: Transport, model: AdaptedModel
) -> None:
    before = transport.sender(None)
    reader = transport.reader()
    before.send(model.whole(1))
    assert_same(reader.fetch(announced(model.whole(1))), model.whole(1))
    model.step()
    assert_same(reader.fetch(announced(publish(transport, model, 2))), model.whole(2))
    model.packer = PolicyPacker(model.dtype, None)
    transport.sender(None).send(model.version(3))
    assert_same(reader.fetch(announced(model.whole(3))), model.whole(3))


class Narrow:
    """A store whose room is for the base and one adapter; it notes what is in it."""

    def __init__(self, store: StoreWriter) -> None:
        self._store = store
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def room_bytes(self) -> float:
        adapters = [part for part in self._store.parts() if part.base]
        self.most = max(self.most, len(adapters))
        return 0 if adapters else 10**9


def test_where_two_adapters_have_no_room_the_old_one_goes_first(
    transport: Transport, model: AdaptedModel
) -> None:
    store = Narrow(transport.outlet())
    sender = PolicySender(store, None)
    for number in range(3):
        policy = model.send(sender, number)
        assert_same(transport.reader().fetch(announced(policy)), model.whole(number))
    if transport.name == "redis":
        assert len([part for part in store.parts() if part.base]) == 1


@pytest.fixture
def published(tmp_path: Path, model: AdaptedModel, bus: Any) -> Iterator[Path]:
    transport = Transport("filesystem", tmp_path, bus)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    publish(transport, model)
    yield tmp_path / "policies" / "000001"


def test_a_version_on_disk_is_an_adapter_that_peft_reads_and_opens_as_a_whole_model(
    published: Path, model: AdaptedModel, tmp_path: Path
) -> None:
    assert is_adapter(published)
    assert json.loads((published / "adapter_config.json").read_text()) == PEFT
    assert load_file(published / ADAPTER_FILE).keys() == model.version(1).shapes.keys()
    with model_directory(published) as whole:
        assert whole != published
        assert not is_adapter(whole)
        assert sorted(path.name for path in whole.iterdir()) == ["config.json", "model.safetensors"]
        assert (whole / "model.safetensors").read_bytes() == model.whole(1).data.tobytes()
    assert not whole.exists()
    write_whole(published, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == model.whole(1).data.tobytes()


def test_a_whole_version_opens_as_it_is(tmp_path: Path) -> None:
    directory = tmp_path / "000001"
    directory.mkdir()
    with model_directory(directory) as opened:
        assert opened == directory


def test_a_fetcher_of_whole_versions_keeps_none_in_memory(transport: Transport) -> None:
    model = AdaptedModel(torch.float32)
    model.packer = PolicyPacker(torch.float32, None)
    transport.sender(None).send(model.version(1))
    reader = PolicyFetcher(transport.store_reader(), deltas=False)
    reader.fetch(announced(model.version(1)))
    assert reader._base is None
