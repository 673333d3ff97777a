"""`trainer.loss.type = "sft"`: masked negative log-likelihood."""

from __future__ import annotations

from onstream.workers.trainer.losses.inputs import LossInputs, LossValues
from onstream.workers.trainer.maths.loss import negative_log_likelihood


def sft_loss(inputs: LossInputs) -> LossValues:
    """−log p of each token, at temperature 1."""
    return LossValues(negative_log_likelihood(inputs.trainer_logprobs))
