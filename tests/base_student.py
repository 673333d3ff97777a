"""A base student: it has no chat template, and ends what it writes with a token of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

OWN_END = "<|endoftext|>"
"""The token, with the id 0, that it ends with, instead of `<|im_end|>` with the id 3."""
LESS = 0.9
EMBEDDING = "model.embed_tokens.weight"


def make_base(student: Path, directory: Path) -> Path:
    """The student of the directory `student`, with a character tokenizer, as a base model.

    It ends its answers with its own end more often than with `<|im_end|>`, which it has read.
    """
    shutil.copytree(student, directory)
    (directory / "chat_template.jinja").unlink()
    _change(directory / "tokenizer_config.json", eos_token=OWN_END)
    _change(directory / "config.json", eos_token_id=0)
    _change(directory / "generation_config.json", eos_token_id=0)
    weights = load_file(directory / "model.safetensors")
    weights[EMBEDDING][0] = weights[EMBEDDING][3]
    weights[EMBEDDING][3] *= LESS
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
