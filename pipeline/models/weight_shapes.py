"""Compares weights with a model by names and shapes, before anything is loaded."""

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
    """The names and shapes that weights must have to be those of `model`.

    Several names may share one tensor, as with a tied head: then one of them is enough.
    """

    model: str
    tensors: tuple[tuple[tuple[str, ...], Shape], ...]  # names that share a tensor, its shape

    @classmethod
    def of(cls, model: Any) -> WeightShapes:
        """The shapes of a transformers model, which may be on the device `meta`."""
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
        """Why weights with the names and shapes `given` are not this model's, or an empty text."""
        missing = []
        wrong = []
        for shared, shape in self.tensors:
            present = [name for name in shared if name in given]
            if not present:
                missing.append(shared[0])
            for name in present:
                if tuple(given[name]) != shape:
                    wrong.append(f"{name} {list(given[name])}, not {list(shape)}")
        if not missing and not wrong:
            return ""
        return (
            f"weights do not fit {self.model}: missing {missing[:3]}, of another shape {wrong[:3]}"
        )


def shapes_of(config: PretrainedConfig) -> WeightShapes:
    """The shapes of the causal language model that `config` describes; loads no weights."""
    family = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return WeightShapes.of(family.from_config(config))
