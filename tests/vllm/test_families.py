"""Families on a real vLLM, by the guard: with the weights that they start with, and after a step.

Each takes a vLLM of its own; CI runs one a day.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from onstream.workers.generator.guard import BFLOAT16_TOLERANCE, Guard
from onstream.workers.generator.student import open_student
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE
from onstream.workers.tiny_models.fresh import save_fresh
from tests.models.families import tiny_config
from tests.models.measured import note
from tests.vllm.conftest import on_vllm
from tests.vllm.reference import CLOSE_NATS
from tests.vllm.test_guard import Trainer

pytestmark = pytest.mark.slow
FAMILIES = [
    "qwen3",
    "qwen2",
    "llama",
    "mistral",
    "olmo3",
    "smollm3",
    "phi3",
    "granite",
    "gemma2",
    "qwen3_5_text",
    "gemma3_text",
    "gpt_oss",
    "ernie4_5_moe",
    "gpt_neox",
    "glm4_moe",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "granitemoe",
]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # which vLLM's CPU kernels take
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    # The sizes of real ones, which are those that vLLM's CPU kernels take.
    "qwen3_5_text": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "gemma3_text": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "mistral": {"sliding_window": 16},
    "olmo3": {"sliding_window": 16},
    "phi3": {"sliding_window": 16},
    "gpt_oss": {"sliding_window": 16},
    "glm4_moe": {"head_dim": 32},  # which vLLM reads, and transformers does not name
}

BFLOAT16 = ("qwen3_5_text",)
"""Whose kernels of vLLM's CPU build say "CPU GDN attention requires BF16."."""


def written(directory: Path, family: str) -> Path:
    """A tiny model of `family` with the character tokenizer."""
    taken = vars(tiny_config(family))
    given = {name: SIZES[name] for name in SIZES if name in taken} | OWN.get(family, {})
    config = tiny_config(family, **given)
    return save_fresh(directory, config, seed=0)


@contextmanager
def trainer_of(directory: Path, family: str) -> Iterator[Trainer]:
    """A trainer of the student there, and vLLM with it."""
    dtype = "bfloat16" if family in BFLOAT16 else "float32"
    student = open_student(on_vllm(directory, max_batch=8, max_model_len=256, dtype=dtype))
    tolerance = BFLOAT16_TOLERANCE if family in BFLOAT16 else CLOSE_NATS
    try:
        trainer = Trainer(student.engine, directory)
        trainer.guard = Guard(student.engine, interval=1, tolerance=tolerance, family=family)
        yield trainer
    finally:
        student.engine.close()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.rotates("families on vLLM", at, len(FAMILIES)))
        for at, family in enumerate(FAMILIES)
    ],
)
def test_a_family_is_right_at_the_start_and_after_updates(tmp_path: Path, family: str) -> None:
    """Its prompts are longer than its windows, and are asked through vLLM's own caches."""
    found = []
    with trainer_of(written(tmp_path, family), family) as trainer:
        for number in (1, 2):
            trainer.publish()
            trainer.answers()
            found.append(f"{trainer.guard._largest:.0e}")
            assert trainer.guard.checked == number
            trainer.step()
    dtype = ", in bfloat16" if family in BFLOAT16 else ""
    note("vLLM", family, f"{found[0]} nats, {found[1]} after an update{dtype}")
