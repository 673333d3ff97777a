"""The directory of a run, which its trainer alone may change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.run_files.ownership import Ownership

FAILURES_ALLOWED = 10
LONGEST_RETRY_S = 30.0


class RunDirectory:
    """The directory `path` of the run, whose files belong to the trainer that holds `lease`.

    Two fences keep out a trainer that was frozen and comes back beside its successor. Redis refuses
    its epoch, and the lock in the directory (`files`) shows another epoch than its own.
    """

    def __init__(self, bus: Bus, lease: Lease, files: Ownership, path: Path) -> None:
        self._bus = bus
        self._lease = lease
        self._files = files
        self.path = path

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change files meanwhile; asks Redis and the disk whose they are.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full.
        """
        with self._bus.lease.writing(self._lease), words_for_disk_errors(self.path):
            yield

    @contextmanager
    def appending(self) -> Iterator[None]:
        """The same without asking Redis, for what happens with every record.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full.
        """
        with self._files.held(), words_for_disk_errors(self.path):
            yield


@contextmanager
def words_for_disk_errors(run_dir: Path) -> Iterator[None]:
    """Turn a failure to write under `run_dir` into words.

    Nothing is lost by it: entries stay pending until a checkpoint.

    Raises:
        UserError: the file system refused a write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise disk_error(run_dir, error) from error


def retry_after_s(failures: int) -> float:
    """How long to wait after so many failures in a row before a write is tried again."""
    return min(2.0**failures / 2, LONGEST_RETRY_S)


def disk_error(run_dir: Path, error: Exception) -> UserError:
    """The words for `error`, met while writing under `run_dir`."""
    free_mib = shutil.disk_usage(run_dir).free >> 20
    return UserError(
        f"{run_dir} could not be written to ({error}); {free_mib} MiB are free on its disk",
        expected="room for checkpoints, policy versions and metrics",
        next_step="Free space and start again: the run goes on from its newest checkpoint "
        "and loses nothing.",
        exit=Exit.FAILED,
    )
