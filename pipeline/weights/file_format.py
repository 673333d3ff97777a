"""The safetensors format: where the tensors of a file are, and the head of a file of tensors.

A file is the length of its header (<u8), the header (JSON), and the tensors' bytes, little-endian,
one after the other. https://huggingface.co/docs/safetensors describes the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]

_METADATA = "__metadata__"
_LENGTH_BYTES = 8  # of the number that says how long the header is
_ALIGNMENT = 8  # bytes; the header is filled up with spaces to a multiple
_TYPES: Final = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
}
"""The dtypes that published weights may have: torch's name, and bytes per element.

In the order of the safetensors library, which writes tensors of the last dtype first.
"""
_CODES: Final = {name: code for code, (name, _) in _TYPES.items()}
_RANKS: Final = {name: rank for rank, (name, _) in enumerate(_TYPES.values())}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, without its values: torch's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorLocation:
    """One tensor: bytes `[start, stop)` of the file, in elements of `size` bytes."""

    dtype: str
    size: int
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def spec(self) -> TensorSpec:
        """What the tensor is, wherever it is."""
        return TensorSpec(self.dtype, self.shape)


def head_for(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorLocation]]:
    """The head of a file of `tensors`, and where in the file each of them is.

    Head and order are those that the safetensors library writes. `metadata` is added to the head.

    Raises:
        ValueError: a tensor has a dtype outside `_TYPES`.
    """
    unknown = [spec.dtype for spec in tensors.values() if spec.dtype not in _CODES]
    if unknown:
        raise ValueError(f"a tensor of {unknown[0]}; expected one of {', '.join(_CODES)}")
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header: dict[str, Any] = {_METADATA: {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        spec = tensors[name]
        stop = offset + _TYPES[_CODES[spec.dtype]][1] * math.prod(spec.shape)
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = _LENGTH_BYTES + len(text)
    del header[_METADATA]
    layout = {name: _location(header[name], start, start + offset) for name in order}
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, layout


def layout_of(data: Bytes) -> dict[str, TensorLocation]:
    """The tensors in `data`, a whole safetensors file, by name.

    Raises:
        ValueError: it is not a safetensors file, or has tensors of a dtype outside `_TYPES`.
    """
    try:
        header, tensors_start = _header(data)
        header.pop(_METADATA, None)
        return {
            name: _location(fields, tensors_start, data.size) for name, fields in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{data.size} bytes are no safetensors file ({error})") from error


def metadata_of(data: Bytes) -> dict[str, str]:
    """The metadata in the head of `data`, a whole safetensors file.

    Raises:
        ValueError: it is not a safetensors file.
    """
    try:
        header, _ = _header(data)
        return dict(header.get(_METADATA, {}))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{data.size} bytes are no safetensors file ({error})") from error


def _header(data: Bytes) -> tuple[dict[str, Any], int]:
    """The header of `data`, and where the tensors start."""
    tensors_start = _LENGTH_BYTES + int(data[:_LENGTH_BYTES].view("<u8")[0])
    return json.loads(data[_LENGTH_BYTES:tensors_start].tobytes()), tensors_start


def _location(fields: dict[str, Any], tensors_start: int, end: int) -> TensorLocation:
    dtype, size = _TYPES[fields["dtype"]]
    start, stop = (tensors_start + offset for offset in fields["data_offsets"])
    shape = tuple(fields["shape"])
    within = tensors_start <= start <= stop <= end
    if not within or stop - start != size * math.prod(shape):
        raise ValueError(f"a tensor {dtype} {list(shape)} at bytes {start} to {stop} of {end}")
    return TensorLocation(dtype, size, shape, start, stop)


def view(data: Bytes, location: TensorLocation) -> Tensor:
    """The tensor at `location` of `data`, whose memory it shares."""
    import torch

    flat = torch.from_numpy(data[location.start : location.stop])
    values: Tensor = flat.view(getattr(torch, location.dtype))
    return values.reshape(location.shape)
