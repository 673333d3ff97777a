"""The losses: what one token of a training step costs, by `trainer.loss.type`.

A loss is a function of `LossInputs`, the tensors of N tokens, that returns `LossValues`. What it
reads is declared by its settings (`onstream.settings.sections.losses`).
"""

from __future__ import annotations

from functools import partial

from onstream.settings.sections.losses import CustomLoss, Loss, RlLoss
from onstream.workers.trainer.losses.custom import load_custom_loss
from onstream.workers.trainer.maths.loss import (
    LossFunction,
    LossInputs,
    LossValues,
    rl_loss,
    sft_loss,
)

__all__ = ["LossFunction", "LossInputs", "LossValues", "loss_function"]


def loss_function(settings: Loss) -> LossFunction:
    """The loss that `settings` describe.

    Raises:
        UserError: a custom loss cannot be imported, or does not work on a made-up batch.
    """
    if isinstance(settings, RlLoss):
        return partial(
            rl_loss,
            teacher_tau=settings.teacher_tau,
            teacher_divergence=settings.teacher_divergence,
            teacher_jsd_beta=settings.teacher_jsd_beta,
            adv_tau=settings.adv_tau,
            kl_tau=settings.kl_tau,
            reverse_kl_clip=settings.reverse_kl_clip,
            trust_region=settings.trust_region,
            trust_low=settings.trust_low,
            trust_high=settings.trust_high,
            max_log_ratio=settings.max_log_ratio,
        )
    if isinstance(settings, CustomLoss):
        return load_custom_loss(settings)
    return sft_loss
