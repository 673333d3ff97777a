"""Weights on disk: one safetensors file, or several with an index, as transformers and vLLM read.

`model.safetensors` holds all weights where they are no more than `SHARD_BYTES`. Otherwise they are
in `model-00001-of-00003.safetensors` and so on, and `model.safetensors.index.json` says which
tensor is in which file. An adapter is in `adapter_model.safetensors`, with peft's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onstream.pipeline.run_files.direct_io import read_whole, write_durably
from onstream.pipeline.run_files.durable import sync
from onstream.pipeline.weights.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONFIG,
    AdapterNote,
    note_of,
    text_note,
)
from onstream.pipeline.weights.digest import tree_digest
from onstream.pipeline.weights.file_format import (
    Bytes,
    TensorLocation,
    TensorSpec,
    head_for,
    layout_of,
    metadata_of,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_WRITE_BYTES = 64 << 20


def write_weights(directory: Path, data: Bytes) -> None:
    """Write the safetensors file `data` into `directory`, durably, in as many files as it takes.

    Written from `data` itself, without a copy.

    Raises:
        OSError: the disk is full.
    """
    if text_note(data) is not None:
        config = metadata_of(data)[CONFIG].encode()
        _write(directory / ADAPTER_CONFIG, [np.frombuffer(config, dtype=np.uint8)])
        _write(directory / ADAPTER_FILE, [data])
        return
    if data.size <= SHARD_BYTES:
        write_durably(directory / WEIGHTS_FILE, data)
        return
    layout = layout_of(data)
    shards = _shards(layout)
    index = dict[str, str]()
    for place, names in enumerate(shards, start=1):
        file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        head, inside = head_for({name: layout[name].spec for name in names})
        parts = [np.frombuffer(head, dtype=np.uint8)]
        parts += [data[layout[name].start : layout[name].stop] for name in inside]
        _write(directory / file, parts)
        index |= dict.fromkeys(names, file)
    total = sum(location.stop - location.start for location in layout.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    _write(directory / INDEX_FILE, [np.frombuffer(text.encode(), dtype=np.uint8)])


def weights_place(directory: Path) -> tuple[str, int] | None:
    """The name of the file to read in `directory`, and the bytes of all weights.

    The file is the weights themselves, an adapter, or an index. None where none is there.
    """
    for name in (WEIGHTS_FILE, ADAPTER_FILE):
        try:
            return name, (directory / name).stat().st_size
        except OSError:
            pass
    try:
        return INDEX_FILE, sum(path.stat().st_size for path in _files(directory / INDEX_FILE))
    except (OSError, ValueError):  # pruned since its directory was listed, say
        return None


def read_weights(path: Path) -> Bytes:
    """The weights at `path`, a safetensors file or an index, as one safetensors file in memory.

    Raises:
        OSError: a file is gone.
        ValueError: a file is no index, or no safetensors file.
    """
    if path.name != INDEX_FILE:
        return read_whole(path)
    specs: dict[str, TensorSpec] = {}
    for _, layout in _opened(path):
        specs |= {name: location.spec for name, location in layout.items()}
    head, places = head_for(specs)
    size = max((place.stop for place in places.values()), default=len(head))
    data = np.empty(size, dtype=np.uint8)
    data[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    for file, layout in _opened(path):
        for name, location in layout.items():
            place = places[name]
            data[place.start : place.stop] = file[location.start : location.stop]
    return data


def digest_in(directory: Path) -> str | None:
    """The digest of the weights in `directory`; None where there are none, or they are damaged."""
    found = weights_place(directory)
    if found is None:
        return None
    try:
        return tree_digest(*_opened(directory / found[0]))
    except (OSError, ValueError):
        return None


def note_in(directory: Path) -> AdapterNote | None:
    """The note of the adapter in `directory`; None where there is none of a run, or a damaged one.

    Reads no more than the head of its file.
    """
    try:
        return note_of(np.memmap(directory / ADAPTER_FILE, dtype=np.uint8, mode="r"))
    except (OSError, ValueError):
        return None


def _shards(layout: Mapping[str, TensorLocation]) -> list[list[str]]:
    """The names of `layout`, in order, cut so that no file has more than `SHARD_BYTES`.

    A tensor that has more by itself is alone in its file.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, location in layout.items():
        tensor_bytes = location.stop - location.start
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
    return shards


def _opened(path: Path) -> Iterator[tuple[Bytes, dict[str, TensorLocation]]]:
    """Each file of the weights at `path`, mapped rather than read, with its layout."""
    files = _files(path) if path.name == INDEX_FILE else [path]
    for file in files:
        data = np.memmap(file, dtype=np.uint8, mode="r")
        yield data, layout_of(data)


def _files(index: Path) -> list[Path]:
    """The files that `index` names.

    Raises:
        ValueError: it is no index.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return [index.with_name(Path(name).name) for name in sorted(set(weight_map.values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({error})") from error


def _write(path: Path, parts: list[Bytes]) -> None:
    with path.open("wb", buffering=0) as file:
        for part in parts:
            _write_all(file, part.data)
    sync(path)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data`: one call may take less than it is given."""
    start = 0
    while start < len(data):
        start += file.write(data[start : start + _WRITE_BYTES])
