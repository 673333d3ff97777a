"""A vLLM process as a member of the trainer's NCCL group: it receives weights beside its model,
while it computes with it.

vLLM's own receiving engine does the transfer. It loads into whatever `set_weight_update_target`
names: here not the model, which would hold some of both versions if the transfer broke off, but
memory of the host, where the digest is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from onstream.pipeline.weights import WeightsError
from onstream.pipeline.weights.nccl_transfer import PolicyHeader, ReceiveBuffer

if TYPE_CHECKING:
    from torch import Tensor


class GroupMember:
    """The receiving end beside `beside`, the process's own weight-transfer engine. Its methods
    block; a thread calls them.
    """

    def __init__(self, beside: WeightTransferEngine) -> None:
        self._device = beside.device
        self._engine = NCCLWeightTransferEngine(
            beside.config, beside.vllm_config, beside.device, beside.model
        )

    def join(self, init_info: dict[str, Any]) -> dict[str, Tensor]:
        """Join the group that vLLM's `init_info` describes, in place of the one before; returns no
        weights.

        Raises:
            WeightsError: it could not be built.
        """
        try:
            self._engine.shutdown()
            torch.accelerator.set_device_index(self._device)  # a thread begins on the first GPU
            self._engine.init_transfer_engine(self._engine.parse_init_info(init_info))
        except (RuntimeError, ValueError, OSError) as error:
            raise WeightsError(
                f"the group of trainer and generators cannot be joined: {error}"
            ) from error
        return {}

    def receive(self, update_info: dict[str, Any], frame: PolicyHeader) -> dict[str, Tensor]:
        """Receive the version of `frame`.

        Raises:
            WeightsError: the transfer broke off, or brought something else.
        """
        filling = ReceiveBuffer(frame)
        try:
            torch.accelerator.set_device_index(self._device)
            self._engine.set_weight_update_target(filling, None)
            self._engine.receive_weights(self._engine.parse_update_info(update_info))
            torch.accelerator.current_stream().synchronize()
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(f"version {frame.number} was not received: {error}") from error
        return filling.policy().tensors()

    def leave(self) -> None:
        """Abort what the group still does, and leave it."""
        self._engine.shutdown()
