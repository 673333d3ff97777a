"""Small Qwen3 models with random weights and the character tokenizer: where training starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from onstream.workers.tiny_models.character_tokenizer import (
    CONTEXT_TOKENS,
    VOCABULARY_SIZE,
    character_tokenizer,
)


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 model with tied embeddings. Heads of 32 are a size that vLLM's CPU kernels take."""

    hidden: int
    layers: int
    intermediate: int
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 32
    context: int = CONTEXT_TOKENS


def write_fresh(
    directory: Path,
    shape: ModelShape,
    seed: int,
    *,
    initializer_range: float = 0.02,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a float32 model of `shape` with `tokenizer`, the character tokenizer where there is
    none; returns `directory`.

    The weights are drawn by `seed`.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = tokenizer or character_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return save_fresh(directory, config, seed, tokenizer)


def save_fresh(
    directory: Path,
    config: PretrainedConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a model of `config` with `tokenizer`, the character tokenizer where there is none;
    returns `directory`.

    The weights are drawn by `seed`, in the precision that is torch's default.
    """
    tokenizer = tokenizer or character_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
