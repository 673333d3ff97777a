"""AdamW, with its moments on the device or in the host's memory. The latter never ran on a GPU.

A trainer needs the moments, twice the weights in float32, for a moment of each step only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from onstream.settings.sections.trainer import OptimSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def new_optimizer(weights: Iterable[Tensor], optim: OptimSettings) -> torch.optim.AdamW:
    """The optimizer of `weights` that the settings ask for."""
    kind = HostStatesAdamW if optim.states == "host" else torch.optim.AdamW
    return kind(
        list(weights),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )


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
