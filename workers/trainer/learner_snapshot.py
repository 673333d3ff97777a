"""What a checkpoint holds of a learner, copied so that it can be written while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onstream.workers.trainer.durability.checkpoint import OPTIMIZER
from onstream.workers.trainer.learner import Learner


class LearnerSnapshot:
    """The weights, optimizer and random state of `learner`, as they are now.

    The weights and the optimizer's are its own tensors until `copy`, which, or `write`, has to come
    before the next update. The copies are in the host's memory: 12 bytes a trained parameter.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._weights = learner.checkpoint_weights()
        self._state = learner.state()

    @property
    def size_bytes(self) -> int:
        """Bytes of all of its tensors; those that are tied count once."""
        found: dict[int, int] = {}
        _each_tensor([self._weights, self._state], found)
        return sum(found.values())

    def copy(self) -> None:
        """Make it independent of the learner."""
        made: dict[tuple[object, ...], Tensor] = {}
        self._weights = _copied(self._weights, made)
        self._state = _copied(self._state, made)

    def write(self, directory: Path) -> None:
        """Write its files into `directory`.

        Raises:
            OSError, RuntimeError, SafetensorError: the disk is full, say.
        """
        self._learner.save_checkpoint(directory, self._weights)
        torch.save(self._state, directory / OPTIMIZER)


def _each_tensor(value: Any, found: dict[int, int]) -> None:
    """Put the sizes in bytes of the tensors in `value` into `found`, by their addresses."""
    if isinstance(value, Tensor):
        found[value.data_ptr()] = value.nbytes
    elif isinstance(value, dict):
        _each_tensor(list(value.values()), found)
    elif isinstance(value, list):
        for one in value:
            _each_tensor(one, found)


def _copied(value: Any, made: dict[tuple[object, ...], Tensor]) -> Any:
    """`value` with a copy of each tensor in it. Tensors that were the same stay the same."""
    if isinstance(value, Tensor):
        same = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if same not in made or not value.numel():
            made[same] = _on_host(value.detach())
        return made[same]
    if isinstance(value, dict):
        return {name: _copied(one, made) for name, one in value.items()}
    if isinstance(value, list):
        return [_copied(one, made) for one in value]
    return value


def _on_host(tensor: Tensor) -> Tensor:
    # numpy asks the kernel for large pages: fresh memory comes several times faster.
    flat = torch.from_numpy(np.empty(tensor.nbytes, dtype=np.uint8))
    return flat.view(tensor.dtype).reshape(tensor.shape).copy_(tensor)
