"""The adapter of a LoRA run as a version: what it adds to which weights of which full set.

It is a safetensors file of peft's names. A note in its metadata says the rest; the version's
digest covers that too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from onstream.pipeline.weights.file_format import Bytes, metadata_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
NOTE = "onstream"
CONFIG = "adapter_config"
BASE = -1
"""Stands for the number of a version where the full set is meant that adapters belong to."""
BASE_PREFIX = "base-"
_PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"
_WEIGHT = ".weight"


class AdapterNote(msgspec.Struct, frozen=True):
    """What the tensors of an adapter leave out.

    `base` is the digest of the full set, `dtype` that of the sums. `scaling` has the factor of each
    adapted weight by its name; `transposed` names those that are kept transposed.
    """

    base: str
    dtype: str
    scaling: dict[str, float]
    transposed: list[str]


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a weight: the product of `b` [out, r] and `a` [r, in], scaled.

    Transposed where the weight is [in, out]. In the order in which peft computes it, so that the
    bits are the same.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool

    def __call__(self) -> Tensor:
        product = self.b @ self.a
        return (product.T if self.transposed else product) * self.scaling


def text_note(data: Bytes) -> str | None:
    """The note in the safetensors file `data` as it is written; None where it holds no adapter."""
    return metadata_of(data).get(NOTE)


def note_of(data: Bytes) -> AdapterNote | None:
    """The note in the safetensors file `data`; None where it holds no adapter.

    Raises:
        ValueError: it is no note.
    """
    text = text_note(data)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=AdapterNote)
    except msgspec.DecodeError as error:
        raise ValueError(f"no note of an adapter ({error})") from error


def base_directory(folder: Path, digest: str) -> Path:
    """The directory in `folder`, that of a run's policies, of the full set with `digest`."""
    return folder / f"{BASE_PREFIX}{digest}"


def metadata_for(
    weights: Mapping[str, LowRank], base: str, dtype: torch.dtype, config: str
) -> dict[str, str]:
    """The metadata of an adapter that adds `weights` to the full set of digest `base`.

    `config` is peft's configuration, for other programs that load the adapter.
    """
    note = AdapterNote(
        base=base,
        dtype=str(dtype).removeprefix("torch."),
        scaling={name: weight.scaling for name, weight in sorted(weights.items())},
        transposed=sorted(name for name, weight in weights.items() if weight.transposed),
    )
    return {NOTE: json.dumps(msgspec.to_builtins(note), separators=(",", ":")), CONFIG: config}


def to_file(weights: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by the names that peft gives them."""
    tensors = {}
    for name, weight in weights.items():
        layer = _PREFIX + name.removesuffix(_WEIGHT)
        tensors[layer + _A] = weight.a
        tensors[layer + _B] = weight.b
    return tensors


def from_file(note: AdapterNote, tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """What the adapter of `note` and `tensors` adds, by the names of the weights.

    Raises:
        KeyError: it lacks a tensor.
    """
    found = {}
    for name, scaling in note.scaling.items():
        layer = _PREFIX + name.removesuffix(_WEIGHT)
        transposed = name in note.transposed
        found[name] = LowRank(tensors[layer + _A], tensors[layer + _B], scaling, transposed)
    return found
