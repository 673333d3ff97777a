"""What a person reads when the disk of a run is full."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from onstream.pipeline.errors import Exit, UserError


@contextmanager
def writing_to(run_dir: Path) -> Iterator[None]:
    """Turns a failure to write under `run_dir` into words; nothing is lost, since entries stay
    pending until a checkpoint.

    Raises:
        UserError: the file system refused a write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise disk_error(run_dir, error) from error


def disk_error(run_dir: Path, error: Exception) -> UserError:
    """The words for `error`, met while writing under `run_dir`."""
    free_mib = shutil.disk_usage(run_dir).free >> 20
    return UserError(
        f"{run_dir} could not be written to ({error}); {free_mib} MiB are free on its disk",
        expected="room for checkpoints, policy versions and metrics",
        next_step="Free space and start again: the run goes on from its newest checkpoint and loses nothing.",
        exit=Exit.FAILED,
    )
