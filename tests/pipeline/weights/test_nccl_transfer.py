"""What is received in pieces is the version that was sent, bit for bit, or is refused."""

from __future__ import annotations

import msgspec
import pytest
import torch

from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.pipeline.weights.nccl_transfer import PolicyHeader, ReceiveBuffer


@pytest.fixture
def policy() -> LoadedPolicy:
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=draw)
        for name, shape in (("b", (3, 5)), ("a", (7,)), ("c.d", ()))
    }
    return LoadedPolicy.of(
        4, {**weights, "half": weights["b"].bfloat16(), "steps": torch.tensor([3])}
    )


def test_the_tensors_fill_the_frame_to_the_same_file_in_whatever_order_they_come(
    policy: LoadedPolicy,
) -> None:
    filling = ReceiveBuffer(
        msgspec.json.decode(msgspec.json.encode(PolicyHeader.of(policy)), type=PolicyHeader)
    )
    assert filling.shapes == policy.shapes
    tensors = list(policy.tensors().items())
    filling.load_weights(reversed(tensors[2:]))
    filling.load_weights(tensors[:2])
    received = filling.policy()
    assert received.number == 4
    assert received.data.tobytes() == policy.data.tobytes()


def test_a_tensor_that_did_not_come_is_named(policy: LoadedPolicy) -> None:
    filling = ReceiveBuffer(PolicyHeader.of(policy))
    filling.load_weights(
        (name, tensor) for name, tensor in policy.tensors().items() if name != "c.d"
    )
    with pytest.raises(WeightsError, match=r"1 tensors of version 4 did not come, such as c\.d"):
        filling.policy()


def test_a_single_bit_that_changed_on_the_way_is_noticed(policy: LoadedPolicy) -> None:
    filling = ReceiveBuffer(PolicyHeader.of(policy))
    filling.load_weights(policy.tensors().items())
    filling.load_weights([("a", policy.tensors()["a"].nextafter(torch.full((7,), 9.0)))])
    with pytest.raises(WeightsError, match="version 4 was announced with"):
        filling.policy()
