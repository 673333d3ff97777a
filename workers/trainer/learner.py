"""Takes training steps: rollouts in, better weights out. Knows no streams and no files but the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from settings.trainer import TrainerSettings

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass
class TrainSample:
    """One prompt and completion with all that its loss needs. P prompt tokens, C completion tokens, k teacher alternatives.

    Logprobs are in nats: the generator's at the sampling temperature, the teacher's at temperature 1.
    """

    prompt_ids: Ids  # [P]
    completion_ids: Ids  # [C]
    loss_mask: npt.NDArray[np.uint8]  # [C]
    generator_logprobs: Floats  # [C]
    teacher_logprobs: Floats | None = None  # [C]
    teacher_top_ids: Ids | None = None  # [C, k]
    teacher_top_logprobs: Floats | None = None  # [C, k]
    teacher_tail_logprobs: Floats | None = None  # [C]
    advantage: float = 0.0
    group: int = 0
    temperature: float = 1.0


class Learner:
    """The student with its optimizer."""

    def __init__(self, model: str | Path, trainer: TrainerSettings, device: torch.device) -> None:
        raise NotImplementedError

    def step(self, samples: Sequence[TrainSample], max_steps: int, *, global_tokens: int | None = None) -> dict[str, float]:
        """One optimizer step over `samples`; returns the step's metrics by their names in metrics.jsonl.

        `global_tokens` is the loss-mask token count over all ranks, the loss's denominator; None: this process is alone.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Step count, optimizer and RNG state: tensors and plain values that `torch.load(weights_only=True)` reads back."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state()` of a learner with the same model; bit for bit on a CPU."""
        raise NotImplementedError

    def save_model(self, directory: Path) -> None:
        """Hugging Face files that any AutoModelForCausalLM loads: float32 weights, config and tokenizer."""
        raise NotImplementedError

    def published_state(self) -> dict[str, torch.Tensor]:
        """The weights as generators get them: on the CPU, cast to the computing precision, tied weights once."""
        raise NotImplementedError
