"""The names of a CLIP vision tower's weights: vLLM 0.32 knows only those of older files.

Those are all under `vision_model`. transformers 5 writes them without it, and so do the trainer's
updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader

if TYPE_CHECKING:
    from torch import Tensor

OLDER_PREFIX = "vision_model."


def read_either_names() -> None:
    """Make vLLM load a CLIP tower from either names."""
    CLIPVisionModel.load_weights = _load_weights


def _load_weights(tower: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load the tower; returns the names of what was loaded."""
    renamed = ((_older_name(name), weight) for name, weight in weights)
    loaded: set[str] = AutoWeightsLoader(tower).load_weights(renamed)
    return loaded


def _older_name(name: str) -> str:
    return name if name.startswith(OLDER_PREFIX) else OLDER_PREFIX + name
