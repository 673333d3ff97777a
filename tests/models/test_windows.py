"""Windows, wherever a family's code keeps them: in the mask, in its layers, in chunks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.exactness import Refused, generator_gap, scoring_gap
from tests.models.families import LAYERS, tiny_model

IN_THE_MASK_ALONE: list[tuple[str, dict[str, Any]]] = [
    ("llama4_text", {"attention_chunk_size": 24}),
    ("phimoe", {"sliding_window": 24}),
    ("qwen2_moe", {"sliding_window": 24, "layer_types": ["sliding_attention"] * LAYERS}),
]


@pytest.mark.parametrize("window", [8, 24, 400])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "olmo3", "phi3", "qwen3", "gpt_oss"])
def test_windows_shorter_and_longer_than_the_prompt(family: str, window: int) -> None:
    model = tiny_model(family, sliding_window=window)
    assert generator_gap(model) < 1e-4
    assert scoring_gap(model) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes"), IN_THE_MASK_ALONE, ids=lambda value: str(value)[:12]
)
def test_a_window_that_is_in_the_mask_alone_is_seen(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    try:
        assert generator_gap(model) < 1e-4
    except Refused as refusal:
        assert family == "qwen2_moe"  # its window is in the mask, and not in its cache
        assert "through the model's own cache: its code raises RuntimeError" in str(refusal)
    assert scoring_gap(model) < 1e-4
