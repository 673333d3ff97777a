"""Where each tensor lies in a safetensors file.

A file is the length of its header (<u8), the header (JSON), and the tensors' bytes, little-endian,
one after the other. https://huggingface.co/docs/safetensors describes the format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH_BYTES = 8  # of the number that says how long the header is
_TYPES: Final = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The dtypes that published weights may have: torch's name, and bytes per element."""


@dataclass(frozen=True)
class TensorLocation:
    """One tensor: bytes `[start, stop)` of the file, in elements of `size` bytes."""

    dtype: str
    size: int
    shape: tuple[int, ...]
    start: int
    stop: int


def layout_of(data: NDArray[np.uint8]) -> dict[str, TensorLocation]:
    """The tensors in `data`, a whole safetensors file, by name.

    Raises:
        ValueError: it is not a safetensors file, or has tensors of a dtype outside `_TYPES`.
    """
    try:
        length = int(data[:_LENGTH_BYTES].view("<u8")[0])
        tensors_start = _LENGTH_BYTES + length
        header: dict[str, Any] = json.loads(data[_LENGTH_BYTES:tensors_start].tobytes())
        header.pop("__metadata__", None)
        return {
            name: _location(fields, tensors_start, data.size) for name, fields in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{data.size} bytes are no safetensors file ({error})") from error


def _location(fields: dict[str, Any], tensors_start: int, end: int) -> TensorLocation:
    dtype, size = _TYPES[fields["dtype"]]
    start, stop = (tensors_start + offset for offset in fields["data_offsets"])
    shape = tuple(fields["shape"])
    within = tensors_start <= start <= stop <= end
    if not within or stop - start != size * math.prod(shape):
        raise ValueError(f"a tensor {dtype} {list(shape)} at bytes {start} to {stop} of {end}")
    return TensorLocation(dtype, size, shape, start, stop)


def view(data: NDArray[np.uint8], location: TensorLocation) -> Tensor:
    """The tensor at `location` of `data`, whose memory it shares."""
    import torch

    flat = torch.from_numpy(data[location.start : location.stop])
    values: Tensor = flat.view(getattr(torch, location.dtype))
    return values.reshape(location.shape)
