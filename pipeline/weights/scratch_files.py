"""Files for other processes of this machine, and the removal of those that killed processes left.

Each process has one directory among the temporary files ($TMPDIR), and keeps a lock on a file in
it. The kernel drops the lock with the process, however it ended and in whatever container it ran.
The next process that needs such a directory removes those without a lock.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_PREFIX = "onstream-policies-"
_LOCK = "lock"


@cache
def scratch() -> Path:
    """This process's directory. It is removed when the process ends normally.

    Raises:
        OSError: it cannot be made.
    """
    _remove_abandoned()
    # Made under a hidden name and renamed once it is locked: in between, others would take it for
    # the directory of a dead process.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    descriptor = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    directory = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _remove_abandoned() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # another user's, or removed by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is alive
        finally:
            os.close(descriptor)
