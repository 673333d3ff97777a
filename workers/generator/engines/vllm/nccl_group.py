"""Never run on a GPU. A vLLM process as a member of the trainer's NCCL group.

It receives weights beside its model, while it computes with it. vLLM's own receiving engine does
the transfer and loads into whatever `set_weight_update_target` names. Here that is not the model,
which would have some of both versions if the transfer broke off, but memory of the host, where the
digest is checked.
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
    """The receiving end, built like `engine`, the process's own weight-transfer engine.

    Its methods block; a thread calls them.
    """

    def __init__(self, engine: WeightTransferEngine) -> None:
        self._device = engine.device
        self._engine = NCCLWeightTransferEngine(
            engine.config, engine.vllm_config, engine.device, engine.model
        )

    def join(self, init_info: dict[str, Any]) -> dict[str, Tensor]:
        """Join the group that vLLM's `init_info` describes, and leave the one before.

        Returns no weights.

        Raises:
            WeightsError: it could not be built.
        """
        try:
            self._engine.shutdown()
            torch.accelerator.set_device_index(self._device)  # a thread starts with the first GPU
            self._engine.init_transfer_engine(self._engine.parse_init_info(init_info))
        except (RuntimeError, ValueError, OSError) as error:
            raise WeightsError(
                f"the group of trainer and generators cannot be joined: {error}"
            ) from error
        return {}

    def receive(self, update_info: dict[str, Any], header: PolicyHeader) -> dict[str, Tensor]:
        """Receive the version of `header`.

        Raises:
            WeightsError: the transfer broke off, or brought something else.
        """
        buffer = ReceiveBuffer(header)
        try:
            torch.accelerator.set_device_index(self._device)
            self._engine.set_weight_update_target(buffer, None)
            self._engine.receive_weights(self._engine.parse_update_info(update_info))
            torch.accelerator.current_stream().synchronize()
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(f"version {header.number} was not received: {error}") from error
        return buffer.policy().tensors()

    def leave(self) -> None:
        """Abort what the group still does, and leave it."""
        self._engine.shutdown()
