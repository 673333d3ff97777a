"""Whether weights are those of a model: told by names and shapes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from onstream.pipeline.models.tokenizer import has_vision

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightShapes:
    """What the weights of `model` have to hold: of each set of names that share one tensor (a tied
    head), one at least.
    """

    model: str
    tensors: tuple[tuple[tuple[str, ...], Shape], ...]

    @classmethod
    def of(cls, model: Any) -> WeightShapes:
        """Those of a transformers model, which may be on the device `meta`."""
        names: dict[int, list[str]] = {}
        shapes: dict[int, Shape] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
            shapes[id(tensor)] = tuple(tensor.shape)
        return cls(
            type(model).__name__,
            tuple((tuple(shared), shapes[key]) for key, shared in names.items()),
        )

    def misfit(self, given: Mapping[str, Shape]) -> str:
        """Why weights with the names and shapes `given` are not this model's; nothing where they
        are.
        """
        missing = [
            shared[0] for shared, _ in self.tensors if not any(name in given for name in shared)
        ]
        named = [
            (name, shape) for shared, shape in self.tensors for name in shared if name in given
        ]
        wrong = [
            f"{name} {list(given[name])}, not {list(shape)}"
            for name, shape in named
            if tuple(given[name]) != shape
        ]
        if not missing and not wrong:
            return ""
        return (
            f"weights do not fit {self.model}: missing {missing[:3]}, of another shape {wrong[:3]}"
        )


def shapes_of(config: PretrainedConfig) -> WeightShapes:
    """Those of the causal language model that `config` describes, without its weights."""
    with torch.device("meta"):
        return WeightShapes.of(
            (
                AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
            ).from_config(config)
        )
