"""Who may change the files of a run: the trainer with the highest epoch.

`<run directory>/trainer.epoch` holds the highest epoch that any trainer of the run got, and who
that was. A trainer changes files only while it holds a lock on this file and has read its own epoch
in it. So a trainer that was frozen, lost its lease and wakes up changes nothing of its successor's,
wherever in its work it froze. And an epoch never falls, even when Redis loses it.

The lock is flock's: the kernel drops it with the process. It holds between all processes of one
machine; docs/delivery.md says what it is worth on a network file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from onstream.pipeline.errors import LeaseLost

log = structlog.get_logger(__name__)

FILE = "trainer.epoch"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
REMEDY = "if it hangs or is stopped, end it: the lock goes with its process"
_POLL_S = 0.1
_REMIND_S = 10.0


class Ownership:
    """One trainer's claim to the files of `run_dir`; its threads take turns.

    Where the file system has no locks, a warning says so.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        self.epoch = 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._turn = threading.RLock()
        self._depth = 0

    def close(self) -> None:
        """Close the file; the claim stands."""
        os.close(self._file)

    def newest(self) -> int:
        """The highest epoch that a trainer of this run got; 0 before the first."""
        return self._read()[0]

    def take(self, epoch: int, holder: str) -> None:
        """Claim the files for the trainer of `epoch`.

        Waits for a trainer that is changing them, and logs which one.

        Raises:
            LeaseLost: a later trainer has them.
        """
        with self._locked():
            newest, owner = self._read()
            if newest >= epoch and (newest, owner) != (epoch, holder):
                raise LeaseLost(f"epoch {epoch} was followed by {newest}, of {owner}")
            text = f"{epoch} {holder}\n".encode()
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))
            os.fsync(self._file)
            self.epoch = epoch

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the right to change files of the run; may be nested.

        Raises:
            LeaseLost: a later trainer has them; nothing was changed.
        """
        with self._locked():
            newest, owner = self._read()
            if newest != self.epoch:
                raise LeaseLost(
                    f"the files of the run belong to epoch {newest}, of {owner}; "
                    f"this trainer's epoch is {self.epoch}"
                )
            yield

    def _read(self) -> tuple[int, str]:
        text = os.pread(self._file, 4096, 0).decode(errors="replace").strip()
        epoch, _, owner = text.partition(" ")
        return (int(epoch), owner) if epoch.isdecimal() else (0, "")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._turn:
            if not self._depth:
                self._lock()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self) -> None:
        remind_at = time.monotonic() + 1.0
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > remind_at:
                    remind_at = time.monotonic() + _REMIND_S
                    owner = self._read()[1] or "unknown"
                    log.warning(
                        "waiting for a trainer in the middle of a write",
                        file=str(self.path),
                        trainer=owner,
                        next_step=REMEDY,
                    )
                time.sleep(_POLL_S)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning(
                    "the file system of the run has no locks: a trainer that wakes up in the "
                    "middle of a write is not kept out"
                )
                return
