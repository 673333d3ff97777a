"""`trainer.loss.type = "custom"`: a loss that is a function of the user's own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.import_path import import_function
from onstream.settings.sections.losses import CustomLoss
from onstream.workers.trainer.maths.loss import LossFunction, LossInputs, LossValues

SETTING = "trainer.loss.function"
_TOKENS = 5  # of the made-up batch


def load_custom_loss(settings: CustomLoss) -> LossFunction:
    """The user's function as a loss, tried out once.

    It is called as `function(inputs, **trainer.loss.args)`, with `LossInputs` of N tokens. It
    returns the loss [N], or the loss and a dictionary of values for the metrics, each [N]: the mean
    of `name` stands as `custom_name` in metrics.jsonl.

    Raises:
        UserError: it cannot be imported, or does not work on a made-up batch.
    """
    function = import_function(settings.function, setting=SETTING)
    loss = _CustomLoss(settings, function)
    _try_out(settings, loss)
    return loss


class _CustomLoss:
    def __init__(self, settings: CustomLoss, function: Callable[..., Any]) -> None:
        self._settings = settings
        self._function = function

    def __call__(self, inputs: LossInputs) -> LossValues:
        try:
            returned = self._function(inputs, **self._settings.args)
        except Exception as error:  # the user's own code may raise anything
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raised = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
            raise _unfit(self._settings, f"raised {raised}", "one loss a token") from error
        loss, metrics = returned if isinstance(returned, tuple) else (returned, {})
        shape = inputs.trainer_logprobs.shape
        self._check(loss, "the loss", shape)
        if not isinstance(metrics, Mapping):
            kind = type(metrics).__name__
            raise _unfit(self._settings, f"returned metrics as a {kind}", "a dictionary of tensors")
        for name, values in metrics.items():
            self._check(values, f"the metric {name!r}", shape)
        return LossValues(loss, {f"custom_{name}": values for name, values in metrics.items()})

    def _check(self, values: object, what: str, shape: torch.Size) -> None:
        """Raises UserError where `values` are no tensor of one value a token."""
        if not isinstance(values, Tensor):
            got = f"returned {what} as a {type(values).__name__}"
        elif values.shape != shape:
            got = f"returned {what} of shape {list(values.shape)}"
        else:
            return
        raise _unfit(self._settings, got, f"a tensor of shape {list(shape)}, one value a token")


def _try_out(settings: CustomLoss, loss: LossFunction) -> None:
    """Raises UserError where `loss` gives no finite values with a finite gradient."""
    inputs = _made_up(settings)
    with torch.enable_grad():
        values = loss(inputs).loss
    if not values.requires_grad:
        raise _unfit(
            settings,
            "returned a loss that does not depend on the trainer's logprobs",
            "a loss with a gradient by trainer_logprobs",
        )
    leaves = (inputs.trainer_logprobs, inputs.trainer_top_logprobs, inputs.trainer_tail_logprobs)
    read = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(values.sum(), read, allow_unused=True)
    for what, found in (("loss", values), *(("gradient", gradient) for gradient in gradients)):
        if found is not None and not found.isfinite().all():
            got = f"gave the {what} {found.detach().tolist()} on a made-up batch"
            raise _unfit(settings, got, "finite values")


def _made_up(settings: CustomLoss) -> LossInputs:
    """A tiny batch with all that the loss says it needs."""
    sampled = -torch.linspace(0.1, 3.0, _TOKENS)
    inputs: dict[str, Tensor] = {
        "token_ids": torch.arange(_TOKENS),
        "trainer_logprobs": sampled.clone().requires_grad_(),
        "trainer_logprobs_unscaled": sampled,
        "entropy": torch.full((_TOKENS,), 1.5),
        "advantage": torch.linspace(-1.0, 1.0, _TOKENS),
    }
    if settings.reads_generator:
        inputs["generator_logprobs"] = sampled - 0.05
    if settings.needs_teacher:
        inputs["teacher_logprobs"] = sampled + 0.05
    if settings.needs_top_k:
        k = settings.most_top_k
        likeliest = torch.full((_TOKENS, k), 0.9 / k).log()
        tail = torch.full((_TOKENS,), 0.1).log()
        inputs |= {
            "teacher_top_logprobs": likeliest,
            "teacher_tail_logprobs": tail,
            "trainer_top_logprobs": (likeliest - 0.1).requires_grad_(),
            "trainer_tail_logprobs": (tail + 0.1).requires_grad_(),
        }
    return LossInputs(**inputs)


def _unfit(settings: CustomLoss, got: str, expected: str) -> UserError:
    return UserError(
        f"{SETTING} = {settings.function!r} {got}",
        expected=expected,
        next_step="Correct the function; docs/objective.md lists what it is given.",
        exit=Exit.USAGE,
    )
