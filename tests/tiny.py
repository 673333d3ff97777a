"""Models of a few thousand random weights, with a tokenizer, as directories or in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from onstream.pipeline.models.packing import Ids

Family = Literal["qwen3", "llama"]
VOCABULARY = 48

# For matrices this small a second thread only waits; on a busy machine for seconds.
torch.set_num_threads(1)


def tiny_model(
    family: Family = "qwen3", *, seed: int = 0, spread: float = 0.3, **config: object
) -> PreTrainedModel:
    """A float32 model with grouped-query attention.

    With the default `spread` of its weights, attention matters to the logprobs.
    """
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=family == "qwen3",
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
        attn_implementation="sdpa",
        **config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shape))
    return model.eval()


def tiny_tokenizer(
    *,
    chat_template: str | None = "{% for message in messages %}{{ message['content'] }}{% endfor %}",
) -> PreTrainedTokenizerFast:
    """One entry a letter or sign, and `<eos>`."""
    entries = [
        "<unk>",
        "<eos>",
        *(chr(code) for code in range(ord("A"), ord("A") + VOCABULARY - 2)),
    ]
    tokenizer = Tokenizer(
        models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="<unk>")
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        chat_template=chat_template,
    )


def write_tiny(directory: Path, family: Family = "qwen3", *, seed: int = 0) -> Path:
    """The model and its tokenizer as Hugging Face files."""
    tiny_model(family, seed=seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def sequences(
    groups: int,
    group_size: int,
    *,
    prompt: tuple[int, int] = (4, 9),
    completion: tuple[int, int] = (1, 7),
    seed: int = 0,
) -> tuple[list[Ids], list[Ids]]:
    """Random prompts, each repeated for its group, and completions.

    Their lengths are within the bounds, both included.
    """
    random = np.random.default_rng(seed)
    prompts = []
    completions = []
    for _ in range(groups):
        ids = random.integers(0, VOCABULARY, random.integers(prompt[0], prompt[1] + 1))
        prompts += [ids] * group_size
        for _ in range(group_size):
            length = random.integers(completion[0], completion[1] + 1)
            completions.append(random.integers(0, VOCABULARY, length))
    return prompts, completions
