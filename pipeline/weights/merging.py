"""Opens a version that is an adapter: as the full set that it makes of its base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.pipeline.weights.adapter import (
    ADAPTER_FILE,
    BASE,
    AdapterNote,
    base_directory,
    from_file,
)
from onstream.pipeline.weights.directory_store import link_model_files
from onstream.pipeline.weights.policy import (
    LoadedPolicy,
    WeightsError,
    WeightSum,
    scratch,
    serialised,
)
from onstream.pipeline.weights.shards import (
    note_in,
    read_weights,
    weights_place,
    write_weights,
)


def merged(base: LoadedPolicy, adapter: LoadedPolicy) -> LoadedPolicy:
    """The full set of version `adapter`: `base` with the adapter added, one tensor at a time.

    These are the bits that the trainer would have published, if it computed on the same device.

    Raises:
        WeightsError: the two do not go together.
    """
    import torch

    note = adapter.adapter
    if note is None or note.base != base.digest:
        raise WeightsError(
            f"version {adapter.number} is no adapter to the weights with the digest "
            f"{base.digest[:12]}"
        )
    weights = base.tensors()
    try:
        added = from_file(note, adapter.tensors())
        sums = {name: WeightSum(weights[name], addition) for name, addition in added.items()}
        data = serialised({**weights, **sums}, getattr(torch, note.dtype))
    except (KeyError, RuntimeError, AttributeError) as error:
        raise WeightsError(
            f"version {adapter.number} cannot be merged into its base: {error}"
        ) from error
    return LoadedPolicy(adapter.number, None, data)


@contextmanager
def model_directory(directory: Path) -> Iterator[Path]:
    """A model directory with all weights of the version in `directory`.

    It is `directory` itself, or a temporary one where that holds an adapter of a run.

    Raises:
        UserError: its base is not there, or damaged.
    """
    if not is_adapter(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}-", dir=scratch()) as temporary:
        whole = Path(temporary) / directory.name
        write_whole(directory, whole)
        yield whole


def is_adapter(directory: Path) -> bool:
    """Whether the version in `directory` is an adapter that a run published."""
    return note_in(directory) is not None


def write_whole(directory: Path, out: Path) -> None:
    """Write the version in `directory`, an adapter, to `out` as a model that loads by itself.

    Raises:
        UserError: its base is not there, or damaged.
        OSError: `out` cannot be written.
    """
    note = note_in(directory)
    assert note is not None, "an adapter"
    folder = base_directory(directory.parent, note.base)
    policy = _read_merged(directory, note, folder)
    out.mkdir()
    link_model_files(folder, out)
    write_weights(out, policy.data)


def _read_merged(directory: Path, note: AdapterNote, folder: Path) -> LoadedPolicy:
    try:
        adapter = LoadedPolicy(int(directory.name), None, read_weights(directory / ADAPTER_FILE))
        place = weights_place(folder)
        if place is None:
            raise WeightsError(f"there are no weights in {folder}")
        return merged(LoadedPolicy(BASE, note.base, read_weights(folder / place[0])), adapter)
    except (OSError, ValueError, WeightsError) as error:
        raise UserError(
            f"{directory} is an adapter that cannot be merged: {error}",
            expected=f"the weights that it belongs to, in {folder}",
            next_step="Restore that directory, or take a version that is left as a checkpoint "
            "alone. A trainer that goes on with the run writes it anew.",
        ) from error
