"""One launcher for a run: a locked file with its pid, which the kernel unlocks when it dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from onstream.pipeline.errors import Exit, UserError

PATIENCE_S = 1.0
"""`onstream status` holds the lock for a moment, to see whether a launcher has it."""


@contextmanager
def only_launcher(run_dir: Path) -> Iterator[None]:
    """Be the only launcher of the run in `run_dir` meanwhile.

    Raises:
        UserError: another one is, or the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / "launcher.pid").open("a+")
    except OSError as error:
        raise UserError(
            f"cannot write in the run directory {run_dir} ({error})",
            expected="a directory to write in",
            next_step="Set run.dir to another one.",
        ) from error
    with file:
        if not _locked(file):
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise UserError(
                f"another `onstream up` (pid {pid}) is running {run_dir}",
                expected="one launcher for a run",
                next_step="Stop that one first, or choose another run.name.",
                exit=Exit.REFUSED,
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    """Whether this process has got the lock of `file`, soon enough."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
