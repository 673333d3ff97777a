"""Students that are not full attention in every layer learn from what vLLM writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.pairs import learns

pytestmark = pytest.mark.slow

# For matrices this small a second thread only waits; on a busy machine for seconds.
torch.set_num_threads(1)

SIZES: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Which vLLM's CPU kernels take."""
OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "gpt_oss": {"intermediate_size": 64},
    "qwen3_5_text": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
DTYPES = {"qwen3_5_text": "bfloat16"}
"""Of the engine: "CPU GDN attention requires BF16.", says vLLM's CPU build."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, marks=pytest.mark.rotates("students of several kinds on vLLM", place, len(OWN))
        )
        for place, family in enumerate(OWN)
    ],
)
def test_a_student_learns_from_what_vllm_writes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dtype = DTYPES.get(family, "float32")
    settings = ("inference.engine=vllm", f"inference.dtype={dtype}")
    learns(tmp_path, family, *settings, **SIZES, **OWN[family])
