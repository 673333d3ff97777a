"""What a forward pass keeps for the backward pass, counted by hooks on tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from onstream.pipeline.models import forward
from onstream.pipeline.models.forward import hidden_states
from onstream.pipeline.models.frozen import round_frozen
from onstream.pipeline.models.packing import pack, share_prompts
from onstream.pipeline.models.prompt_sharing import prepare
from onstream.pipeline.models.recompute import recompute_layers
from onstream.settings.sections.trainer import LoraSettings
from onstream.workers.trainer import lora

SHORT = 64
LONG = 128
VOCABULARY = 64


@dataclass(frozen=True)
class Qwen3Shape:
    """The sizes of one layer."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head: int

    def config(self, layers: int) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
        )


def saved_bytes_per_token(
    shape: Qwen3Shape, *, half: bool, adapter: LoraSettings | None = None, recompute: bool = False
) -> float:
    """Bytes of one more token in one more layer: what does not grow with both drops out."""
    of_layers = []
    for layers in (1, 2):
        model = Qwen3ForCausalLM._from_config(shape.config(layers), attn_implementation="sdpa")
        model.eval()
        prepare(model)
        if adapter is not None:
            lora.attach(model, adapter, saved=None)
            if half:
                round_frozen(model)
        if recompute:
            recompute_layers(model, draws_random=False)
        more = saved_bytes(model, LONG, half=half) - saved_bytes(model, SHORT, half=half)
        of_layers.append(more / (LONG - SHORT))
    return of_layers[1] - of_layers[0]


def saved_bytes(model: PreTrainedModel, tokens: int, *, half: bool) -> int:
    """Bytes kept of the forward pass over one sequence, without the weights themselves."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens)
    (row,) = pack(share_prompts([ids[: tokens // 2]], [ids[tokens // 2 :]]), tokens)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: list[Tensor] = []  # alive, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        # Attention of a CPU alone is in float32, and the formula is that of a GPU.
        patch.object(forward, "attend", scaled_dot_product_attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        states = hidden_states(model, row)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    assert states.requires_grad
    return sum(one.nbytes() for address, one in storages.items() if address not in weights)
