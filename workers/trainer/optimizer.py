"""AdamW, with its moments on the device, in the host's memory, or in 8 bits.

The latter two never ran on a GPU. A trainer needs the moments, twice the weights in float32, for a
moment of each step only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from onstream.pipeline.errors import UserError
from onstream.settings.extras import missing_package
from onstream.settings.sections.trainer import OptimSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def new_optimizer(weights: Iterable[Tensor], optim: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of `weights` that the settings ask for.

    Raises:
        UserError: its package is not installed.
    """
    given: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.states == "8bit":
        eight_bits: torch.optim.Optimizer = _bitsandbytes().AdamW8bit(list(weights), **given)
        return eight_bits
    kind = HostStatesAdamW if optim.states == "host" else torch.optim.AdamW
    return kind(list(weights), **given, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Go on from the `state_dict` of an optimizer that kept its moments in as many bits.

    Raises:
        UserError: that one kept them otherwise.
    """
    were_eight = any(MOMENTS[0] not in state for state in saved["state"].values())
    are_eight = not isinstance(optimizer, torch.optim.AdamW)
    if saved["state"] and were_eight != are_eight:
        other = '"8bit"' if were_eight else '"device" or "host"'
        raise UserError(
            f"the checkpoint's optimizer has its moments in {8 if were_eight else 32} bits",
            expected=f"{8 if are_eight else 32} bits, by trainer.optim.states",
            next_step=f"Set trainer.optim.states = {other}, as the run had it, or begin another "
            "run from its model.",
        )
    optimizer.load_state_dict(saved)


def _bitsandbytes() -> Any:
    # Its loader tells of kernels for 4-bit models that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise missing_package("bitsandbytes", 'trainer.optim.states = "8bit"') from error
    return bitsandbytes.optim


class HostStatesAdamW(torch.optim.AdamW):
    """AdamW whose moments are in the host's memory, and on the device one weight's at a time.

    The results are those of `torch.optim.AdamW`, bit for bit, and so is the `state_dict`: each goes
    on from what the other has saved.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the moments are read from the host next

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight] or self._start(weight)
        moments = [state[name].to(weight.device, non_blocking=True) for name in MOMENTS]
        steps = state["step"].to(weight.device, non_blocking=True)
        beta1, beta2 = group["betas"]
        adamw(
            [weight],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [steps],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in zip(MOMENTS, moments, strict=True):
            state[name].copy_(moment, non_blocking=True)
        state["step"].copy_(steps, non_blocking=True)

    def _start(self, weight: Tensor) -> dict[str, Tensor]:
        pinned = weight.is_cuda  # copies of other memory would wait for one another
        state: dict[str, Tensor] = {
            name: torch.zeros(weight.shape, dtype=weight.dtype, pin_memory=pinned)
            for name in MOMENTS
        }
        state["step"] = torch.zeros((), dtype=torch.float32, pin_memory=pinned)
        self.state[weight] = state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what this or a `torch.optim.AdamW` has saved.

        torch's own would put all the moments on the device.
        """
        saved_groups = state_dict["param_groups"]
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
            for weight, number in zip(group["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    self._load(weight, state_dict["state"][number])

    def _load(self, weight: Tensor, saved: dict[str, Tensor]) -> None:
        for name, value in self._start(weight).items():
            value.copy_(saved[name])
