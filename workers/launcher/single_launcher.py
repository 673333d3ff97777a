"""One launcher for a run: a locked file with its pid, which the kernel unlocks when it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onstream.pipeline.errors import Exit, UserError


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise UserError(
                f"another `onstream up` (pid {pid}) is running {run_dir}",
                expected="one launcher for a run",
                next_step="Stop that one first, or choose another run.name.",
                exit=Exit.REFUSED,
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
