"""A delta on its base gives the new weights bit for bit, in few bytes, and anything else is
refused.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.pipeline.weights.delta import _with_steps, apply_deltas, encode, overwrite
from onstream.pipeline.weights.file_format import layout_of


def policy(number: int = 0, **state: torch.Tensor) -> LoadedPolicy:
    return LoadedPolicy.of(number, state)


def roundtrip(base: LoadedPolicy, new: LoadedPolicy) -> int:
    """Bytes of the delta; it gives `new`, once or twice applied."""
    delta = encode(base, new)
    assert delta is not None and delta.data is not None
    for times in (1, 2):
        made = apply_deltas(new.number, new.digest, base.data.copy(), [delta.data] * times)
        assert np.array_equal(made.data, new.data)
    return int(delta.data.size)


@pytest.mark.parametrize(
    ("indices", "reach", "filled"),
    [
        ([2, 9], 3, [2, 5, 8, 9]),
        ([0, 1, 2], 3, [0, 1, 2]),
        ([3], 3, [2, 3]),
        ([2, 5, 8], 3, [2, 5, 8]),
        ([11], 4, [3, 7, 11]),
    ],
)
def test_far_apart_elements_get_others_between_them(
    indices: list[int], reach: int, filled: list[int]
) -> None:
    assert _with_steps(np.array(indices), reach).tolist() == filled


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.03, 0.3, 0.9])
def test_whatever_changed_arrives(dtype: torch.dtype, share: float) -> None:
    draw = torch.Generator().manual_seed(int(share * 1e6))
    before = torch.randint(0, 200, (700, 300), generator=draw).to(dtype)
    flat = before.clone().reshape(-1)
    chosen = torch.randperm(flat.numel(), generator=draw)[: int(share * flat.numel())]
    flat[chosen] = (flat[chosen] + 1).to(dtype)
    base = policy(w=before, still=torch.ones(50_000))
    new = policy(1, w=flat.reshape(before.shape), still=torch.ones(50_000))
    size = roundtrip(base, new)
    wide = (chosen.numel() + 700 * 300 / 65536) * (before.element_size() + 2)
    bits = chosen.numel() * before.element_size() + 700 * 300 / 8
    assert size <= min(wide, bits, before.nbytes) + 1000


def test_bits_are_compared_so_that_negative_zero_and_nan_arrive_too() -> None:
    still = torch.zeros(1000)
    base = policy(w=torch.tensor([0.0, 1.0, float("nan")]), still=still)
    new = policy(1, w=torch.tensor([-0.0, 1.0, float("nan")]), still=still)
    roundtrip(base, new)
    delta = encode(base, new)
    assert delta is not None and delta.share == 1 / 1003


@pytest.mark.parametrize(
    ("share", "kind"), [(0.001, "at"), (0.05, "at"), (0.3, "in"), (0.97, "to")]
)
def test_the_way_of_the_fewest_bytes_is_taken(share: float, kind: str) -> None:
    after = torch.zeros(40_000, dtype=torch.bfloat16)
    after[torch.rand(40_000, generator=torch.Generator().manual_seed(3)) < share] = 1
    delta = encode(
        policy(w=after * 0, still=torch.ones(50_000)), policy(1, w=after, still=torch.ones(50_000))
    )
    assert delta is not None and delta.data is not None
    assert {name.partition("/")[0] for name in load(delta.data.tobytes())} == {kind, "to"}


def test_equal_weights_are_an_empty_delta() -> None:
    base = policy(w=torch.ones(1000))
    assert roundtrip(base, policy(1, w=torch.ones(1000))) < 200
    delta = encode(base, base)
    assert delta is not None and delta.share == 0


def test_no_delta_where_it_would_be_no_smaller() -> None:
    delta = encode(policy(w=torch.zeros(1000)), policy(1, w=torch.ones(1000)))
    assert delta is not None and delta.data is None
    assert delta.share == 1


def test_bits_for_a_tensor_of_another_size_are_refused() -> None:
    base = policy(w=torch.zeros(5000))
    delta = encode(
        base, policy(1, w=torch.zeros(5000).index_fill(0, torch.arange(0, 5000, 3), 1.0))
    )
    assert delta is not None and delta.data is not None
    longer = policy(w=torch.zeros(5100))
    with pytest.raises(WeightsError, match="625 bytes of bits for 5100 elements"):
        overwrite(longer.data.copy(), longer.layout, delta.data)


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.ones(9)},
        {"w": torch.ones(3, 3)},
        {"w": torch.ones(9, dtype=torch.bfloat16)},
        {"w": torch.ones(9), "v": torch.ones(1)},
    ],
    ids=["name", "shape", "dtype", "one more"],
)
def test_there_is_no_delta_between_different_models(other: dict[str, torch.Tensor]) -> None:
    assert encode(policy(w=torch.ones(9)), LoadedPolicy.of(1, other)) is None


def test_a_delta_on_another_base_is_found_out_by_the_digest_of_what_comes_of_it() -> None:
    base = policy(w=torch.zeros(5000))
    wrong = policy(w=torch.full((5000,), 2.0))
    new = policy(1, w=torch.zeros(5000).index_fill(0, torch.tensor([7]), 1.0))
    delta = encode(base, new)
    assert delta is not None and delta.data is not None
    with pytest.raises(WeightsError, match="announced with"):
        apply_deltas(1, new.digest, wrong.data.copy(), [delta.data])


def test_a_delta_for_other_tensors_is_refused() -> None:
    delta = encode(
        policy(w=torch.zeros(5000)),
        policy(1, w=torch.zeros(5000).index_fill(0, torch.tensor([4999]), 1.0)),
    )
    assert delta is not None and delta.data is not None
    for state in (
        {"v": torch.zeros(5000)},
        {"w": torch.zeros(4999)},
        {"w": torch.zeros(5000, dtype=torch.bfloat16)},
    ):
        target = LoadedPolicy.of(0, state)
        with pytest.raises(WeightsError, match="no delta of these weights"):
            overwrite(target.data.copy(), layout_of(target.data), delta.data)


def test_bytes_that_are_no_delta_are_refused() -> None:
    base = policy(w=torch.zeros(10))
    with pytest.raises(WeightsError, match="4 bytes are no delta"):
        overwrite(base.data.copy(), base.layout, np.zeros(4, dtype=np.uint8))


def test_random_courses_of_versions_arrive_however_their_deltas_are_cut() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        size = int(draw.integers(1, 3000))
        state = draw.integers(0, 5, size).astype(np.int64)
        versions = []
        for number in range(5):
            versions.append(
                policy(number, w=torch.from_numpy(state.copy()), ballast=torch.zeros(4000))
            )
            state[draw.random(size) < draw.random() * 0.4] += 1
        deltas = [encode(before, after) for before, after in itertools.pairwise(versions)]
        data = [delta.data for delta in deltas if delta and delta.data is not None]
        assert len(data) == 4
        made = apply_deltas(4, versions[4].digest, versions[0].data.copy(), data)
        assert np.array_equal(made.data, versions[4].data)
