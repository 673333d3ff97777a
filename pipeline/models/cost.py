"""How long a training step takes on a GPU, from its settings and the sizes of its models alone.

Pure arithmetic, at the longest completions, without prompts. No part of it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from onstream.pipeline.models.memory import BFLOAT16

H100_FLOPS: Final = 989e12
"""Dense products in bfloat16, a second, of an H100 (SXM): NVIDIA's data sheet."""
H100_BYTES: Final = 3.35e12
"""What it reads of its memory in a second: the same."""
COMPUTE_SHARE: Final = 0.3
"""The share of the products that training and scoring are taken to reach."""
MEMORY_SHARE: Final = 0.5
"""The share of the reading that decoding is taken to reach."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of one GPU for the parts of one step, one after the other."""

    tokens: int  # of completions
    generate_s: float
    score_s: float
    train_s: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.generate_s + self.score_s + self.train_s


def step_cost(
    *,
    student: int,
    teacher: int,
    rollouts: int,
    completion_tokens: int,
    slots: int,
    cache_bytes: int,
    adapter: bool,
    recompute: bool,
    generates: bool = True,
) -> StepCost:
    """What a step costs whose completions are all at their longest.

    With S parameters of the student, T of the teacher and N tokens:

    - generate: each decoding step reads the 2 S bytes of the weights once for all slots, and each
      token the keys and values before it, half a completion on average; or 2 S N products,
      whichever takes longer.
    - score: 2 T N products.
    - train: 6 S N; 4 S N under an adapter, whose model gets no gradients; 2 S N more where layers
      are recomputed.

    Args:
        student: parameters.
        teacher: parameters, 0 where none scores here.
        rollouts: of the step.
        completion_tokens: of each of them.
        slots: rollouts that are decoded at once.
        cache_bytes: keys and values of the student, of one token.
        adapter: whether an adapter is trained.
        recompute: whether layers are recomputed in the backward pass.
        generates: whether the student writes the completions.
    """
    tokens = rollouts * completion_tokens
    compute = COMPUTE_SHARE * H100_FLOPS
    weights_read = ceil(rollouts / slots) * completion_tokens * BFLOAT16 * student
    cache_read = tokens * completion_tokens // 2 * cache_bytes
    reading_s = (weights_read + cache_read) / (MEMORY_SHARE * H100_BYTES)
    factor = (4 if adapter else 6) + (2 if recompute else 0)
    return StepCost(
        tokens=tokens,
        generate_s=max(reading_s, 2 * student * tokens / compute) if generates else 0.0,
        score_s=2 * teacher * tokens / compute,
        train_s=factor * student * tokens / compute,
    )
