"""What is known of a model by its tokenizer and configuration alone. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from onstream.pipeline.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ModelInfo:
    """A student or a teacher, as the two are compared.

    `end_ids` are the ids that end its turns, and `vocabulary_size` is the width of its output.
    """

    name: str
    tokenizer: Any
    end_ids: frozenset[int]
    context_tokens: int
    vocabulary_size: int


def load_model_info(name: str) -> ModelInfo:
    """The model `name`, a directory or a name of the hub.

    Raises:
        UserError: it has no usable tokenizer.
    """
    tokenizer = load_tokenizer(name)
    config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    return ModelInfo(
        name,
        tokenizer,
        _end_ids(tokenizer, config),
        int(text.max_position_embeddings),
        int(text.vocab_size),
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> frozenset[int]:
    """Every token that ends a turn, by the tokenizer or by the configuration."""
    configured = getattr(config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None)
