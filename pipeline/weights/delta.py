"""Sparse deltas: which weights differ from those of a base version, and their new values.

A delta is a safetensors file. For each tensor that changed it has `to/<name>`, the new values, bit
for bit, and where they go, in whichever form takes the fewest bytes:

- `at/<name>`: the distances between the changed elements, less one, as uint8 or uint16. Where more
  than 256 (65,536) elements lie between two, an element in between is written with the value that
  it has, which overwriting does not mind.
- `in/<name>`: a bit for each element, as numpy.packbits gives them.
- neither: the values are the whole tensor.

Overwriting is idempotent. The result is checked by the digest that the weights must have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onstream.pipeline.weights.file_format import Bytes, TensorLocation, layout_of
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError

_LONGEST = {1: 1 << 8, 2: 1 << 16}  # bytes of a distance -> the longest that fits
_FORMAT = {"format": "onstream-delta/1"}


@dataclass(frozen=True)
class Delta:
    """What turns the base into the new version.

    `data` is None where it would be no smaller than a full set. `share` of the weights changed.
    """

    data: Bytes | None
    share: float


def encode(base: LoadedPolicy, new: LoadedPolicy) -> Delta | None:
    """What changed from `base` to `new`; None if their tensors differ in name, dtype or shape."""
    from safetensors.numpy import save

    if base.layout != new.layout:
        return None
    arrays: dict[str, NDArray[np.generic]] = {}
    changed = 0
    total = 0
    for name, location in new.layout.items():
        values = _elements(new.data, location)
        differs = _elements(base.data, location) != values
        count = int(np.count_nonzero(differs))
        changed += count
        total += values.size
        if count:
            for kind, array in _encoded(values, differs, count).items():
                arrays[f"{kind}/{name}"] = array
    data = np.frombuffer(bytearray(save(arrays, metadata=_FORMAT)), dtype=np.uint8)
    smaller = data.size < new.data.size
    return Delta(data if smaller else None, changed / total if total else 0.0)


def _encoded(
    values: NDArray[np.generic], differs: NDArray[np.bool_], count: int
) -> dict[str, NDArray[np.generic]]:
    """The arrays that overwrite those of `values` [n] that differ, in the fewest bytes.

    Args:
        differs: [n], true for `count` elements.
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
    filled = {width: _with_steps(indices, longest) for width, longest in _LONGEST.items()}
    width = min(filled, key=lambda width: filled[width].size * (width + values.itemsize))
    distances = np.diff(filled[width], prepend=-1) - 1
    return {"at": distances.astype(f"<u{width}"), "to": values[filled[width]]}


def _with_steps(indices: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """`indices`, ascending, and the fewest others so that no step is longer than `longest`.

    The first step is from −1. [2, 9] with steps of at most 3 becomes [2, 5, 8, 9].
    """
    steps = np.diff(indices, prepend=-1)
    counts = (steps - 1) // longest + 1  # of the indices that each step becomes
    if indices.size == counts.sum():
        return indices
    ends = np.cumsum(counts)
    within = np.arange(1, ends[-1] + 1) - np.repeat(ends - counts, counts)
    filled: NDArray[np.int64] = np.repeat(indices - steps, counts) + longest * within
    filled[ends - 1] = indices
    return filled


def overwrite(data: Bytes, layout: Mapping[str, TensorLocation], delta: Bytes) -> None:
    """Apply `delta` in place to the safetensors file `data`, which has the given `layout`.

    Raises:
        WeightsError: `delta` is not a delta, or one for other tensors. `data` may be changed in
            part by then.
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


def apply_deltas(number: int, digest: str, data: Bytes, deltas: Iterable[Bytes]) -> LoadedPolicy:
    """Version `number`: the safetensors file `data`, overwritten in place by `deltas` in order.

    Raises:
        WeightsError: the result does not have the digest `digest`, or a delta does not fit.
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


def _elements(data: Bytes, location: TensorLocation) -> NDArray[np.generic]:
    """The tensor at `location`, flat, as unsigned integers.

    Bits are compared and copied, so −0 and NaN arrive as they are.
    """
    return data[location.start : location.stop].view(f"<u{location.size}")
