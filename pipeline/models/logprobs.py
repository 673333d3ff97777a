"""Logprobs of given tokens without a [tokens, vocabulary] tensor of more than one chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.packing import Packed


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model says of N tokens, float32, nats. The `top` fields are there with `top_k` > 0 only."""

    sampled: Tensor  # [N], logprobs of the targets
    entropy: Tensor  # [N]
    top_ids: Tensor | None  # [N, k], likeliest first
    top_logprobs: Tensor | None  # [N, k]
    tail_logprob: Tensor | None  # [N], of everything outside the k, from all logits


def hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """The last hidden states that predict the packed targets: [N, H], in the order of `packed.targets`."""
    raise NotImplementedError


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The model's output projection."""
    raise NotImplementedError


@torch.no_grad()
def token_logprobs(
    hidden: Tensor, head: nn.Linear, targets: Tensor, *, temperature: float = 1.0, top_k: int = 0, chunk: int = 1024
) -> TokenLogprobs:
    """Logprobs [N] of `targets` [N] given `hidden` [N, H], `chunk` positions at a time."""
    raise NotImplementedError
