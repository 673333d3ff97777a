"""What is compared of a student and its teacher, read from a tokenizer and a configuration alone.
Needs no torch.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from onstream.pipeline.models.tokenizer import load_tokenizer
from onstream.workers.teacher.compatibility import ModelInfo


def load_model_info(name: str) -> ModelInfo:
    """What the comparison needs to know of the model `name`, from its tokenizer and its
    configuration alone.

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
    """Every token that ends a turn, by the tokenizer or by the model's configuration, which may
    name several.
    """
    named = getattr(config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None)
