"""Sparse overwrite deltas: which weights differ from those of a base version, and what they are
now.

A delta is a safetensors file. Of each tensor that changed it has `to/<name>`, the new values, bit
for bit, and where they go, in the way of the fewest bytes: `at/<name>`, the distances between the
changed elements, less one, as uint8 or uint16 (where more than 256, or 65,536, elements lie between
two, one of them is written with the value it has: overwriting does not mind); `in/<name>`, a bit
for each element, as numpy.packbits lays them; or neither, where the values are the whole tensor.
Overwriting is idempotent, and what comes of it is checked by the digest of the whole file that it
must give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onstream.pipeline.weights.policy import Bytes, LoadedPolicy, WeightsError
from onstream.pipeline.weights.safetensors_layout import TensorLocation, layout_of

_REACH = {1: 1 << 8, 2: 1 << 16}  # bytes of a distance -> the longest that fits
_FORMAT = {"format": "onstream-delta/1"}


@dataclass(frozen=True)
class Delta:
    """`data` turns the base into the new version; None where it would be no smaller. `share` of the
    weights changed.
    """

    data: Bytes | None
    share: float


def encode(base: LoadedPolicy, new: LoadedPolicy) -> Delta | None:
    """What changed from `base` to `new`; None where their tensors are not the same ones."""
    from safetensors.numpy import save

    if base.layout != new.layout:
        return None
    arrays: dict[str, NDArray[np.generic]] = {}
    changed = 0
    for name, entry in new.layout.items():
        after = _elements(new.data, entry)
        differs = _elements(base.data, entry) != after
        count = int(np.count_nonzero(differs))
        changed += count
        if count:
            arrays |= {
                f"{kind}/{name}": array for kind, array in _encoded(after, differs, count).items()
            }
    data = np.frombuffer(bytearray(save(arrays, metadata=_FORMAT)), dtype=np.uint8)
    total = sum(_count(entry) for entry in new.layout.values())
    return Delta(data if data.size < new.data.size else None, changed / total if total else 0.0)


def _encoded(
    values: NDArray[np.generic], differs: NDArray[np.bool_], count: int
) -> dict[str, NDArray[np.generic]]:
    """The arrays that overwrite the `count` elements of `values` that differ, in the way of the
    fewest bytes.
    """
    bits_bytes = -(-values.size // 8) + count * values.itemsize
    if count * (1 + values.itemsize) < bits_bytes:  # the least that distances can take
        arrays = _by_distances(values, np.flatnonzero(differs))
        if sum(array.nbytes for array in arrays.values()) < bits_bytes:
            return arrays
    if bits_bytes < values.nbytes:
        return {"in": np.packbits(differs), "to": values[differs]}
    return {"to": values}


def _by_distances(
    values: NDArray[np.generic], indices: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    found = {width: _within_reach(indices, reach) for width, reach in _REACH.items()}
    width = min(found, key=lambda width: found[width].size * (width + values.itemsize))
    return {
        "at": (np.diff(found[width], prepend=-1) - 1).astype(f"<u{width}"),
        "to": values[found[width]],
    }


def _within_reach(indices: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """`indices`, ascending, with the fewest others between them that keep each within `reach` of
    the one before; the first, of −1.

    [2, 9] within 3 are [2, 5, 8, 9].
    """
    steps = np.diff(indices, prepend=-1)
    pieces = (steps - 1) // reach + 1
    if indices.size == pieces.sum():
        return indices
    ends = np.cumsum(pieces)
    piece = np.arange(1, ends[-1] + 1) - np.repeat(ends - pieces, pieces)
    filled: NDArray[np.int64] = np.repeat(indices - steps, pieces) + reach * piece
    filled[ends - 1] = indices
    return filled


def overwrite(data: Bytes, layout: Mapping[str, TensorLocation], delta: Bytes) -> None:
    """Apply `delta` to the safetensors file `data`, whose `layout` is given, in place.

    Raises:
        WeightsError: `delta` is none, or one for other tensors; `data` may be changed in part by
            then.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(delta.tobytes())
        for key, values in arrays.items():
            kind, _, name = key.partition("/")
            if kind == "to":
                target = _elements(data, layout[name])
                if values.dtype != target.dtype:
                    raise ValueError(f"values of {values.dtype} for a tensor of {target.dtype}")
                target[_where(arrays, name, target.size)] = values
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{delta.size} bytes are no delta of these weights: {error}") from error


def _where(
    arrays: Mapping[str, NDArray[np.generic]], name: str, size: int
) -> NDArray[np.generic] | slice:
    """Which of the `size` elements of the tensor `name` are overwritten."""
    if (distances := arrays.get(f"at/{name}")) is not None:
        return np.cumsum(distances.astype(np.int64) + 1) - 1
    if (bits := arrays.get(f"in/{name}")) is not None:
        if bits.size != -(-size // 8):
            raise ValueError(f"{bits.size} bytes of bits for {size} elements")
        return np.unpackbits(bits.astype(np.uint8, copy=False), count=size).view(np.bool_)
    return slice(None)


def _elements(data: Bytes, entry: TensorLocation) -> NDArray[np.generic]:
    """The tensor at `entry`, flat, as unsigned integers: bits are compared, so that −0 and NaN
    arrive as they are.
    """
    return data[entry.start : entry.stop].view(f"<u{entry.size}")


def _count(entry: TensorLocation) -> int:
    return (entry.stop - entry.start) // entry.size


def applied(number: int, digest: str, data: Bytes, deltas: Iterable[Bytes]) -> LoadedPolicy:
    """Version `number` of `digest`: the safetensors file `data`, overwritten in place by `deltas`
    in their order.

    Raises:
        WeightsError: something else came of it.
    """
    deltas = list(deltas)
    if deltas:
        try:
            layout = layout_of(data)
        except ValueError as error:
            raise WeightsError(f"version {number} cannot be made from its base: {error}") from error
        for delta in deltas:
            overwrite(data, layout, delta)
    return LoadedPolicy(number, digest, data)
