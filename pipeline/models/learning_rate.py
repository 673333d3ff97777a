"""The learning rate that `trainer.optim.lr = "auto"` means, by the student and by who teaches it.

Pure arithmetic: no torch, and no weights. docs/tuning.md has what it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onstream.pipeline.models.memory import DecoderSizes
from onstream.settings.sections.trainer import TrainerSettings

MEASURED_WIDTH = 96
MEASURED_RATE = 5e-4
"""The rate that a student of that width learns fastest and safely with."""
LEAST_RATE = 1e-6
"""Below it no published on-policy training of whole weights goes."""
UNKNOWN_RATE = 1e-5
REWARDS_FACTOR = 0.2
"""Of a rate where rewards alone teach: at the whole one the score falls under its start."""
ADAPTER_FACTOR = 10.0
"""An adapter's rate to that of whole weights (Schulman et al., *LoRA Without Regret*, 2025)."""
LEAST_ADAPTER_RATE = 1e-4


@dataclass(frozen=True)
class LearningRate:
    """The rate at the end of the warm-up, and why it is that."""

    value: float
    reason: str


def automatic_rate(
    config: Mapping[str, Any], trainer: TrainerSettings, *, from_own_start: bool = False
) -> LearningRate:
    """The rate for a student of this `config.json`, or for an adapter on it, with this loss.

    It falls with the square of the hidden size, from 5e-4 at 96 to 4.4e-6 at 1,024, and stays at
    1e-6 from 2,147 on. That of an adapter is ten times as high, and at least 1e-4. Where rewards
    alone teach it is a fifth, and not under 1e-6. They do too beside a teacher that is the
    student's own start (`from_own_start`), which holds the student and shows it nothing new.
    """
    shape = DecoderSizes.of(config)
    if shape is None:
        whole = UNKNOWN_RATE
        reason = "the student's config.json does not say its sizes"
    else:
        share = MEASURED_WIDTH / shape.hidden
        whole = max(LEAST_RATE, MEASURED_RATE * min(1.0, share**2))
        reason = f"hidden size {shape.hidden:,}"
    rate = whole
    if trainer.lora is not None:
        rate = max(LEAST_ADAPTER_RATE, ADAPTER_FACTOR * whole)
        reason += ", an adapter is trained"
    taught = trainer.loss.needs_teacher and not from_own_start
    if trainer.loss.needs_reward and not taught:
        rate = max(LEAST_RATE, REWARDS_FACTOR * rate)
        reason += ", rewards alone teach"
    return LearningRate(_two_digits(rate), reason)


def with_learning_rate(
    trainer: TrainerSettings, config: Mapping[str, Any], *, from_own_start: bool = False
) -> TrainerSettings:
    """`trainer` with a number for its rate: its own, or the one for a student of `config`."""
    if trainer.optim.lr != "auto":
        return trainer
    rate = automatic_rate(config, trainer, from_own_start=from_own_start)
    optim = trainer.optim.model_copy(update={"lr": rate.value})
    return trainer.model_copy(update={"optim": optim})


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")
