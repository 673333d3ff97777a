"""Where a process puts files for other processes of this machine, and how those of a killed one are
cleared away.

Each process has one directory among the temporary files ($TMPDIR), and keeps a lock on a file in
it. The kernel drops the lock with the process, whatever ended it and in whatever container it ran;
the next process that needs such a directory removes those without.
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
    """This process's directory; it goes when the process ends by itself.

    Raises:
        OSError: there is no place for it.
    """
    _clear()
    # Under another name until it is locked, so that nobody takes it for a dead one's.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    fcntl.flock(os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    directory = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _clear() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(descriptor)
