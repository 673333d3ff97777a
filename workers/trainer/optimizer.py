"""AdamW, with its moments on the device, in the host's memory, or in 8 bits; Muon for matrices.

Of these only AdamW with its moments on the device ever ran on a GPU. A trainer needs the moments,
twice the weights in float32, for a moment of each step only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.settings.extras import missing_package
from onstream.settings.sections.trainer import OptimSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_MOMENTS = {MOMENTS[0], "momentum_buffer"}
"""Of AdamW, and of Muon. What keeps moments in 8 bits saves them under other names."""


def hidden_matrices(model: PreTrainedModel) -> list[Tensor]:
    """The trained weights of `model` that Muon takes: matrices inside it.

    Not embeddings and the output layer, whose rows are tokens; nor norms and biases. Of an adapter
    it is every factor. Experts that are kept as one tensor of three dimensions are none.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    output = model.get_output_embeddings()
    of_tokens = {id(weight) for module in (*tables, output) for weight in module.parameters()}
    return [
        weight
        for weight in model.parameters()
        if weight.requires_grad and weight.ndim == 2 and id(weight) not in of_tokens
    ]


def new_optimizer(
    weights: Iterable[Tensor], optim: OptimSettings, matrices: Iterable[Tensor] = ()
) -> torch.optim.Optimizer:
    """The optimizer of `weights` that the settings ask for.

    `matrices` are those of them that Muon takes, if it is asked for.

    Raises:
        UserError: its package is not installed.
    """
    if optim.type == "muon":
        return MuonAndAdamW(list(weights), list(matrices), optim)
    given: dict[str, Any] = {
        "lr": optim.known_lr,
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
    were_eight = any(FIRST_MOMENTS.isdisjoint(state) for state in saved["state"].values())
    are_eight = not isinstance(optimizer, torch.optim.AdamW | MuonAndAdamW)
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


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for `matrices`, AdamW for the rest of `weights`.

    Muon makes the momentum of a matrix nearly orthogonal and moves the weight by that. The length
    of its moves is adjusted to that of AdamW's (arXiv:2502.16982), so that one learning rate is
    right for both.
    """

    def __init__(self, weights: list[Tensor], matrices: list[Tensor], optim: OptimSettings) -> None:
        others = _without(weights, matrices)
        shared: dict[str, Any] = {"lr": optim.known_lr, "weight_decay": optim.weight_decay}
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices, **shared, momentum=optim.momentum, adjust_lr_fn="match_rms_adamw"
            )
            parts.append(muon)
        if others:
            adamw = torch.optim.AdamW(
                others, **shared, betas=optim.betas, eps=optim.eps, fused=True
            )
            parts.append(adamw)
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # They only compute: what is saved and loaded is this optimizer's.
            part.param_groups = [group]
            part.state = self.state
            part.step()


def _without(weights: list[Tensor], taken: list[Tensor]) -> list[Tensor]:
    numbers = {id(weight) for weight in taken}
    return [weight for weight in weights if id(weight) not in numbers]


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
