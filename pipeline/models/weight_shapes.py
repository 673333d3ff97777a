"""Compares weights with a model by names and shapes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from onstream.pipeline.models.tokenizer import has_vision
from onstream.pipeline.models.weight_names import as_in_memory

Shape = tuple[int, ...]


@dataclass
class WeightShapes:
    """The names and shapes that weights must have to be those of `model`.

    Several names may share one tensor, as with a tied head: then one of them is enough.

    Args:
        model: a transformers model, which may be on the device `meta`.
        tensors: the names that share a tensor in memory, and its shape.
    """

    model: PreTrainedModel
    tensors: tuple[tuple[tuple[str, ...], Shape], ...]
    _fit: Mapping[str, Shape] = field(default_factory=dict)  # those that were found to fit last

    @classmethod
    def of(cls, model: PreTrainedModel) -> WeightShapes:
        """The shapes of `model`."""
        names: dict[int, list[str]] = {}
        shapes: dict[int, Shape] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
            shapes[id(tensor)] = tuple(tensor.shape)
        return cls(model, tuple((tuple(shared), shapes[key]) for key, shared in names.items()))

    def misfit(self, given: Mapping[str, Shape]) -> str:
        """Why weights with the names and shapes `given` are not this model's, or an empty text.

        They may have the names of files, or those in memory.
        """
        if given == self._fit:
            return ""
        model = type(self.model).__name__
        tensors = {name: torch.empty(shape, device="meta") for name, shape in given.items()}
        try:
            named = as_in_memory(self.model, tensors)
        except (RuntimeError, ValueError) as error:
            return f"weights do not fit {model}: {' '.join(str(error).split())[:200]}"
        missing = []
        wrong = []
        for shared, shape in self.tensors:
            present = [name for name in shared if name in named]
            if not present:
                missing.append(shared[0])
            for name in present:
                if tuple(named[name].shape) != shape:
                    wrong.append(f"{name} {list(named[name].shape)}, not {list(shape)}")
        if missing or wrong:
            return (
                f"weights do not fit {model}: missing {missing[:3]}, of another shape {wrong[:3]}"
            )
        self._fit = dict(given)
        return ""


def shapes_of(config: PretrainedConfig) -> WeightShapes:
    """The shapes of the causal language model that `config` describes; loads no weights."""
    family: Any = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return WeightShapes.of(family.from_config(config))
