"""Where each tensor lies in a safetensors file. https://huggingface.co/docs/safetensors describes
the format.

A file is the length of its header (<u8), the header (JSON), and the tensors' bytes, little-endian,
one after the other.
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

_LENGTH = 8  # bytes that say how long the header is
_TYPES: Final = {
    **{
        "F64": ("float64", 8),
        "F32": ("float32", 4),
        "F16": ("float16", 2),
        "BF16": ("bfloat16", 2),
    },
    **{
        "I64": ("int64", 8),
        "I32": ("int32", 4),
        "I16": ("int16", 2),
        "I8": ("int8", 1),
        "U8": ("uint8", 1),
        "BOOL": ("bool", 1),
    },
}
"""The dtypes that published weights may have: torch's name, and bytes an element."""


@dataclass(frozen=True)
class TensorLocation:
    """One tensor: its bytes are `[start, stop)` of the file, in elements of `size` bytes."""

    dtype: str
    size: int
    shape: tuple[int, ...]
    start: int
    stop: int


def layout_of(data: NDArray[np.uint8]) -> dict[str, TensorLocation]:
    """The tensors in `data`, a whole safetensors file, by name.

    Raises:
        ValueError: it is none, or has tensors of a dtype that weights do not have.
    """
    try:
        length = int(data[:_LENGTH].view("<u8")[0])
        header: dict[str, Any] = json.loads(data[_LENGTH : _LENGTH + length].tobytes())
        header.pop("__metadata__", None)
        layout = {
            name: _entry(fields, _LENGTH + length, data.size) for name, fields in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{data.size} bytes are no safetensors file ({error})") from error
    return layout


def _entry(fields: dict[str, Any], base: int, end: int) -> TensorLocation:
    dtype, size = _TYPES[fields["dtype"]]
    start, stop = (base + offset for offset in fields["data_offsets"])
    shape = tuple(fields["shape"])
    if not base <= start <= stop <= end or stop - start != size * math.prod(shape):
        raise ValueError(f"a tensor {dtype} {list(shape)} at bytes {start} to {stop} of {end}")
    return TensorLocation(dtype, size, shape, start, stop)


def view(data: NDArray[np.uint8], entry: TensorLocation) -> Tensor:
    """The tensor at `entry` of `data`, whose memory it shares."""
    import torch

    values: Tensor = torch.from_numpy(data[entry.start : entry.stop]).view(
        getattr(torch, entry.dtype)
    )
    return values.reshape(entry.shape)
