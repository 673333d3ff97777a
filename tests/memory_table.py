"""Writes docs/memory.md: what a trainer takes, by the formula and by what hooks count.

`python -m tests.memory_table`, or `make memory-table`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from onstream.pipeline.models.memory import (
    KEPT,
    DecoderSizes,
    TrainerMemory,
    layer_token_bytes,
    trainer_memory,
)
from onstream.settings.sections.trainer import LoraSettings, TrainerSettings
from tests.saved_bytes import Qwen3Shape, saved_bytes_per_token

TARGET = Path("docs/memory.md")
GB = 1e9
HEAD = """# What a trainer takes of its memory

`onstream check` prints it before anything starts, part by part, and refuses a trainer that cannot
fit its GPU, with the setting that would make it fit. It is a formula over the settings and the
student's `config.json` (`pipeline/models/memory.py`): no weights are read, and torch is not needed.
The memory of a GPU is what `nvidia-smi` says. **No line of this page was measured on a GPU.**

- *weights*: 4 bytes a parameter; 2 of a frozen model under an adapter in bfloat16, and 4 while it
  is loaded.
- *gradients*: 4 a trained parameter.
- *optimizer*: 8 a trained parameter, in the host's memory with `trainer.optim.states = "host"`; 2
  with `"8bit"`. With `trainer.optim.type = "muon"` 4 a parameter of a matrix inside the model, or
  of an adapter, and 8 of the rest.
- *activations*: those of the longest row, which has `trainer.microbatch` tokens, or is one longer
  completion. In bfloat16 also 2 bytes a parameter for casts of float32 weights: of all layers, or
  of one where they are recomputed.
- *head*: 16 for each of `trainer.head_chunk` × vocabulary, and where the output layer is trained
  4 a parameter of it, 6 in bfloat16.
- *published*: 4 a parameter, 2 in bfloat16, in the host's memory; of a LoRA run at its start alone.
- *checkpoint*: a copy of the trained weights and of the optimizer's moments in the host's memory,
  while one is written: 12 a trained parameter, about 6 with moments in 8 bits.

A layer keeps so many bytes a token for each number of its hidden state, of its queries, of its keys
and of its MLP (of the experts that a token takes), and 8 a head; with `trainer.recompute = "layer"`
it keeps 4 for each number of the hidden state, and one layer at a time the rest. The formula is
that of a Qwen3 layer. A family without norms of queries and keys takes less; a hybrid's other
layers, masks of shared prompts, and images are not counted. A tenth of the GPU is left to CUDA and
to what fragments: `trainer.recompute = "auto"` recomputes beyond that.

"""
NAMES = {
    (False, False): "float32",
    (False, True): "float32, adapter",
    (True, False): "bfloat16",
    (True, True): "bfloat16, adapter",
}
COUNTED = (Qwen3Shape(64, 160, 4, 2, 16), Qwen3Shape(128, 256, 8, 4, 16))
MODELS = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
ALIKE = {
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
TOKENS = (2048, 16384, 32768)
RANK = 16


def main() -> int:
    """Write the page."""
    TARGET.write_text(HEAD + factors() + counted() + planned())
    return 0


def factors() -> str:
    """The bytes of a layer."""
    lines = ["| | hidden state | queries | keys | MLP |", "|---|---|---|---|---|"]
    for kind, name in NAMES.items():
        lines.append(f"| {name} | {' | '.join(map(str, KEPT[kind]))} |")
    return "\n".join(lines) + "\n\n"


def counted() -> str:
    """What hooks count of tiny layers, beside the formula."""
    lines = [
        "## Counted\n",
        "The tensors that one more token of one more layer keeps for the backward pass, by hooks "
        "(`tests/saved_bytes.py`,\non a CPU), beside the formula. Bytes; the last column with "
        "recomputation.\n",
        "| hidden, MLP, heads × size, key-value heads | | counted | formula | recomputed |",
        "|---|---|---|---|---|",
    ]
    for shape in COUNTED:
        sizes = DecoderSizes.of(shape.config(1).to_dict())
        assert sizes is not None
        for (half, adapted), name in NAMES.items():
            adapter = LoraSettings(rank=8) if adapted else None
            found = saved_bytes_per_token(shape, half=half, adapter=adapter)
            again = saved_bytes_per_token(shape, half=half, adapter=adapter, recompute=True)
            formula = layer_token_bytes(sizes, adapter, half=half)
            title = (
                f"{shape.hidden}, {shape.intermediate}, {shape.heads} × {shape.head}, "
                f"{shape.key_value_heads}"
            )
            lines.append(f"| {title} | {name} | {found:,.0f} | {formula:,} | {again:,.0f} |")
    return "\n".join(lines) + "\n\n"


def planned() -> str:
    """What trainers of Qwen3's sizes take of a GPU."""
    lines = [
        "## Qwen3 on one GPU\n",
        f"In bfloat16, GB, by the formula: one row of so many tokens, adapters of rank {RANK}; an "
        "H100 gives 85.\nThe sums are what is on the device: with every activation kept, with "
        "layers recomputed, and then with\nAdamW's moments in the host's memory too.\n",
        "| | tokens | weights | gradients | optimizer | head | activations | together | "
        "activations recomputed | together | moments on the host | published | checkpoint |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in MODELS.items():
        for adapter in (None, LoraSettings(rank=RANK)):
            for tokens in TOKENS:
                lines.append(line(name, sizes, adapter, tokens))
    return "\n".join(lines) + "\n"


def line(name: str, sizes: dict[str, Any], adapter: LoraSettings | None, tokens: int) -> str:
    """Of one model, in full or with an adapter."""
    shape = DecoderSizes.of(ALIKE | sizes)
    assert shape is not None
    trainer = TrainerSettings(lora=adapter)

    def taken(recompute: bool) -> TrainerMemory:
        return trainer_memory(shape, trainer, half=True, recompute=recompute, row_tokens=tokens)

    plain = taken(False)
    again = taken(True)
    cells = (
        plain.weights,
        plain.gradients,
        plain.optimizer,
        plain.head,
        plain.activations,
        plain.device,
        again.activations,
        again.device,
        again.device - again.optimizer,
        plain.published,
        plain.checkpoint,
    )
    words = " | ".join(f"{cell / GB:.1f}" for cell in cells)
    return f"| {name} {'full' if adapter is None else 'LoRA'} | {tokens:,} | {words} |"


if __name__ == "__main__":
    sys.exit(main())
