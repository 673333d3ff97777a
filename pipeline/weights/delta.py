"""Sparse overwrite deltas: which weights differ from those of a base version, and what they are now.

A delta is a safetensors file with two arrays a tensor: `at/<name>`, the distances between the changed elements, less one, as
uint8 or uint16, and `to/<name>`, their new values, bit for bit. Where more than 256 (65,536) unchanged elements lie between two, one of
them is written with the value it has: overwriting does not mind. A tensor most of which changed is there whole, as `all/<name>`.
Overwriting is idempotent, and what comes of it is checked by the digest of the whole file that it must give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.weights.layout import Entry, layout_of
from pipeline.weights.policy import Bytes, LoadedPolicy, WeightsError

_REACH = {1: 1 << 8, 2: 1 << 16}  # bytes of a distance -> the longest that fits
_FORMAT = {"format": "onstream-delta/1"}


@dataclass(frozen=True)
class Delta:
    """`data` turns the base into the new version; None where it would be no smaller. `share` of the weights changed."""

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
        before, after = _elements(base.data, entry), _elements(new.data, entry)
        indices = np.flatnonzero(before != after)
        changed += indices.size
        if indices.size:
            arrays |= _encoded(name, indices, after)
    data = np.frombuffer(bytearray(save(arrays, metadata=_FORMAT)), dtype=np.uint8)
    total = sum(_count(entry) for entry in new.layout.values())
    return Delta(data if data.size < new.data.size else None, changed / total if total else 0.0)


def _encoded(name: str, indices: NDArray[np.int64], values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
    """The arrays that overwrite `values[indices]`: the fewest bytes of the three ways."""
    found = {width: _within_reach(indices, reach) for width, reach in _REACH.items()}
    cost = {width: positions.size * (width + values.itemsize) for width, positions in found.items()}
    width = min(cost, key=lambda width: cost[width])
    if cost[width] >= values.nbytes:
        return {f"all/{name}": values}
    distances = (np.diff(found[width], prepend=-1) - 1).astype(f"<u{width}")
    return {f"at/{name}": distances, f"to/{name}": values[found[width]]}


def _within_reach(indices: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """`indices`, ascending, with the fewest others between them that keep each within `reach` of the one before; the first, of −1.

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


def overwrite(data: Bytes, layout: Mapping[str, Entry], delta: Bytes) -> None:
    """Apply `delta` to the safetensors file `data`, whose `layout` is given, in place.

    Raises:
        WeightsError: `delta` is none, or one for other tensors; `data` may be changed in part by then.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(delta.tobytes())
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            target = _elements(data, layout[name])
            if kind == "all":
                target[:] = _bits(array, target)
            elif kind == "at":
                target[np.cumsum(array.astype(np.int64) + 1) - 1] = _bits(arrays[f"to/{name}"], target)
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{delta.size} bytes are no delta of these weights: {error}") from error


def _bits(array: NDArray[np.generic], target: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.dtype != target.dtype:
        raise ValueError(f"values of {array.dtype} for a tensor of {target.dtype}")
    return array


def _elements(data: Bytes, entry: Entry) -> NDArray[np.generic]:
    """The tensor at `entry`, flat, as unsigned integers: bits are compared, so that −0 and NaN arrive as they are."""
    return data[entry.start : entry.stop].view(f"<u{entry.size}")


def _count(entry: Entry) -> int:
    return (entry.stop - entry.start) // entry.size


def applied(number: int, digest: str, data: Bytes, deltas: Iterable[Bytes]) -> LoadedPolicy:
    """Version `number` of `digest`: the safetensors file `data`, overwritten in place by `deltas` in their order.

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
