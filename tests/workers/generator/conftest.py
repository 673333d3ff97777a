"""A tiny random student, sharp enough that its choices matter, and the forward pass that everything
is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from onstream.workers.tiny_models.character_tokenizer import character_tokenizer

CONTEXT = 96


def random_student(seed: int = 0) -> Qwen3ForCausalLM:
    """Qwen3-shaped with grouped queries; its weights are large, so that its distributions are far
    from uniform.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def student() -> Qwen3ForCausalLM:
    return random_student()


@pytest.fixture
def other_weights() -> dict[str, torch.Tensor]:
    return random_student(seed=1).state_dict()


@pytest.fixture
def plain_logprobs(student: Qwen3ForCausalLM) -> Callable[..., Any]:
    """`f(prompt_ids, token_ids, temperature=1.0, weights=None)` -> [C, V] logprobs of one plain
    forward pass.
    """
    pristine = copy.deepcopy(student)

    def compute(
        prompt_ids: Any,
        token_ids: Any,
        temperature: float = 1.0,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> Any:
        model = pristine
        if weights is not None:
            model = copy.deepcopy(pristine)
            model.load_state_dict(weights)
        ids = torch.tensor(np.concatenate([prompt_ids, token_ids]), dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        return (logits / temperature).log_softmax(dim=-1).numpy()

    return compute


@pytest.fixture
def student_dir(tmp_path: Path, student: Qwen3ForCausalLM) -> Path:
    """The student on disk with a character tokenizer and its chat template."""
    directory = tmp_path / "student"
    student.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory
