"""Makes a student of half of a model's layers: a start for a compression, not yet a good model.

    python -m benchmarks.real.half MODEL DIRECTORY

Embeddings, norms, tokenizer and chat template are the model's own. The directory is there whole or
not at all.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from torch.nn import ModuleList
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_half(whole: Path, directory: Path) -> None:
    """Write the model in `whole`, a decoder of 4 layers or more, with half of them."""
    model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    keep_layers(model, kept_layers(model.config.num_hidden_layers))
    new = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a start that was stopped
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(whole).save_pretrained(new)
    new.rename(directory)


def kept_layers(layers: int) -> list[int]:
    """Half of `layers`, evenly spread, the first and the last among them.

    >>> kept_layers(10)
    [0, 2, 4, 7, 9]
    """
    half = layers // 2
    return [round(place * (layers - 1) / (half - 1)) for place in range(half)]


def keep_layers(model: Any, kept: list[int]) -> None:
    """Take all layers out of `model` but those `kept`; the configuration follows."""
    config = model.config
    model.model.layers = ModuleList(model.model.layers[layer] for layer in kept)
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):  # which not every family names
        config.layer_types = [types[layer] for layer in kept]


if __name__ == "__main__":
    make_half(Path(sys.argv[1]), Path(sys.argv[2]))
