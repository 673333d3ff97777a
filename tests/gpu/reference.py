"""What plain transformers says, one sequence at a time, and how far a result may be from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from onstream.pipeline.records import Ids

FLOAT32_NATS = 1e-3
"""Sums in another order; on a CPU they differ by less than 1e-4."""
ROUNDINGS = 2.0
"""In bfloat16: how many times the rounding of plain transformers in bfloat16 is allowed."""
SLACK_NATS = 5e-3

Pair = tuple[Ids, Ids]


def plain_model(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    return model.to(device).eval()


@torch.no_grad()
def distributions(model: Any, pairs: Sequence[Pair]) -> list[Tensor]:
    """The log distribution [C, V], float32 on the CPU, at each token of each completion."""
    found = []
    for prompt, completion in pairs:
        ids = torch.from_numpy(np.concatenate((prompt, completion)).astype(np.int64))
        logits = model(ids[None].to(model.device), use_cache=False).logits[0]
        found.append(logits[len(prompt) - 1 : -1].float().log_softmax(-1).cpu())
    return found


def sampled(logprobs: Sequence[Tensor], pairs: Sequence[Pair]) -> Tensor:
    """Of each completion's tokens, end to end."""
    parts = [
        one.gather(1, torch.from_numpy(completion.astype(np.int64))[:, None])[:, 0]
        for one, (_, completion) in zip(logprobs, pairs, strict=True)
    ]
    return torch.cat(parts)


class Expected:
    """Logprobs of `pairs` by plain transformers in float32, and the distance that `dtype` may have.

    In bfloat16 that is a multiple of how far plain transformers in bfloat16 is from float32.
    """

    def __init__(
        self, model_dir: Path, pairs: Sequence[Pair], dtype: torch.dtype, device: torch.device
    ) -> None:
        exact = plain_model(model_dir, torch.float32, device)
        self.logprobs = distributions(exact, pairs)
        self.sampled = sampled(self.logprobs, pairs)
        self.nats = FLOAT32_NATS
        if dtype != torch.float32:
            rounded = distributions(plain_model(model_dir, dtype, device), pairs)
            worst = (sampled(rounded, pairs) - self.sampled).abs().max().item()
            self.nats = ROUNDINGS * worst + SLACK_NATS

    def check(self, found: Tensor) -> None:
        """Make sure that `found` [N] are the sampled logprobs, within the distance."""
        worst = (found.float().cpu() - self.sampled).abs().max().item()
        print(f"at most {worst:.1e} nats from plain transformers in float32, of {self.nats:.1e}")
        assert worst <= self.nats


def groups() -> list[Pair]:
    """Three groups of 4, 1 and 3 members, of unlike length; one completion is a single token."""
    random = np.random.default_rng(0)

    def ids(tokens: int) -> Ids:
        return random.integers(8, 128, tokens).astype(np.int32)

    prompts = [ids(120), ids(33), ids(5)]
    lengths = {0: (64, 200, 1, 31), 1: (90,), 2: (17, 130, 64)}
    return [(prompts[group], ids(tokens)) for group, sizes in lengths.items() for tokens in sizes]
