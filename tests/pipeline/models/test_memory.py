"""The memory formula against what hooks count, and against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from onstream.pipeline.models.memory import (
    DecoderSizes,
    layer_token_bytes,
    longest_row,
    memory_plan,
    trainer_memory,
)
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import LoraSettings, TrainerSettings
from tests.saved_bytes import Qwen3Shape, saved_bytes_per_token

CLOSE = 0.02
"""Of the formula to the count of the hooks, relative."""
SMALL = (
    Qwen3Shape(64, 160, 4, 2, 16),
    Qwen3Shape(96, 96, 2, 2, 32),
    Qwen3Shape(128, 256, 8, 4, 16),
)
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GIB = 2**30


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, LoraSettings(rank=8)], ids=["full", "lora"])
def test_the_formula_of_a_layer_is_what_hooks_count(
    shape: Qwen3Shape, half: bool, adapter: LoraSettings | None
) -> None:
    counted = saved_bytes_per_token(shape, half=half, adapter=adapter)
    sizes = DecoderSizes.of(shape.config(1).to_dict())
    assert sizes is not None
    formula = layer_token_bytes(sizes, adapter, half=half)
    print(f"{shape}: counted {counted:.0f}, formula {formula}")
    assert formula == pytest.approx(counted, rel=CLOSE)


def test_the_parameters_of_qwen3_4b_are_four_billion() -> None:
    shape = DecoderSizes.of(QWEN3_4B)
    assert shape is not None
    assert shape.parameters == pytest.approx(4_022_468_096, rel=1e-4)


def test_a_trainer_holds_weights_gradients_and_two_moments_in_float32() -> None:
    shape = DecoderSizes.of(QWEN3_4B)
    assert shape is not None
    memory = trainer_memory(
        shape, TrainerSettings(), half=True, recompute=True, row_tokens=2048, parameters=4 * 10**9
    )
    assert (memory.weights, memory.gradients, memory.optimizer) == (16e9, 16e9, 32e9)
    assert memory.published == 8e9
    assert memory.checkpoint == 48e9


def test_moments_in_8_bits_take_two_bytes_and_their_scales() -> None:
    shape = DecoderSizes.of(QWEN3_4B)
    assert shape is not None
    trainer = TrainerSettings.model_validate({"optim": {"states": "8bit"}})
    memory = trainer_memory(
        shape, trainer, half=True, recompute=True, row_tokens=2048, parameters=4 * 10**9
    )
    assert (memory.optimizer, memory.host_optimizer) == (8.125e9, 0)


def test_muon_has_one_moment_of_an_adapter() -> None:
    shape = DecoderSizes.of(QWEN3_4B)
    assert shape is not None
    taken = {}
    for kind in ("adamw", "muon"):
        trainer = TrainerSettings.model_validate({"optim": {"type": kind}, "lora": {}})
        memory = trainer_memory(shape, trainer, half=True, recompute=True, row_tokens=2048)
        taken[kind] = memory.optimizer
    assert taken["muon"] == taken["adamw"] / 2


def test_recomputed_layers_take_far_fewer_bytes_of_a_long_row() -> None:
    plain, again = (plan(recompute=choice, microbatch=16384).memory for choice in ("none", "layer"))
    assert plain is not None and again is not None
    assert plain.activations > 8 * again.activations


@pytest.mark.parametrize(
    ("device_gib", "expected"),
    [(None, False), (80, True), (1000, False)],
    ids=["a CPU", "one H100", "a card that holds all"],
)
def test_auto_recomputes_where_a_gpu_would_be_too_small(
    device_gib: int | None, expected: bool
) -> None:
    device_bytes = None if device_gib is None else device_gib * GIB
    assert plan(device_bytes=device_bytes).recompute is expected


def test_auto_recomputes_on_a_gpu_where_the_models_sizes_are_not_known() -> None:
    settings = Settings.model_validate({})
    found = memory_plan(settings, {"odd": 1}, half=True, device_bytes=80 * GIB)
    assert found.recompute
    assert found.memory is None


def test_the_longest_row_is_a_microbatch_or_a_longer_completion() -> None:
    settings = {"inference": {"sampling": {"max_completion": 16384}}}
    assert longest_row(Settings.model_validate({})) == 8192
    assert longest_row(Settings.model_validate(settings)) == 16384


def test_the_experts_that_a_token_takes_are_activations_and_all_of_them_weights() -> None:
    experts = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 768}
    dense = DecoderSizes.of({**QWEN3_4B, "intermediate_size": 4 * 768})
    sparse = DecoderSizes.of(QWEN3_4B | experts)
    assert dense is not None and sparse is not None
    assert layer_token_bytes(sparse, None, half=True) == layer_token_bytes(dense, None, half=True)
    assert sparse.layer - dense.layer == 3 * 2560 * 768 * 60


def plan(*, device_bytes: float | None = None, **trainer: Any) -> Any:
    settings = Settings.model_validate({"trainer": trainer})
    return memory_plan(settings, QWEN3_4B, half=True, device_bytes=device_bytes)
