"""A stand-in for the local cache of the hub: models by their shapes, without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

FILES = Path(__file__).parents[1] / "chat_templates"
QWEN3 = {
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
QWEN2_5 = QWEN3 | {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
QWEN3_0_6B = QWEN3 | {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072}
SHAPES = {
    "Qwen/Qwen3-1.7B": QWEN3
    | {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144},
    "Qwen/Qwen3-4B": QWEN3
    | {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728}
    | {"num_attention_heads": 32},
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN2_5
    | {"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960}
    | {"num_attention_heads": 12},
    "Qwen/Qwen2.5-3B-Instruct": QWEN2_5
    | {"hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008},
    "PrimeIntellect/Qwen3-0.6B-Reverse-Text-SFT": QWEN3_0_6B,
    "PrimeIntellect/Qwen3-0.6B-Reverse-Text-RL": QWEN3_0_6B,
}
"""What `config.json` of each model says of its sizes."""


def fill_cache(cache: Path) -> None:
    """Put the small files of every model into `cache`, as huggingface_hub keeps them."""
    for name, shape in SHAPES.items():
        model = cache / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("1")
        (snapshot / "config.json").write_text(json.dumps(shape))
        (snapshot / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        shutil.copy(FILES / "tokenizers" / "qwen3.json", snapshot / "tokenizer.json")
        shutil.copy(FILES / "templates" / "qwen3.jinja", snapshot / "chat_template.jinja")
