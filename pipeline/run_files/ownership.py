"""Whose the files of a run are: those of the trainer with the highest epoch, as the run's own disk
says.

`<run directory>/trainer.epoch` holds the highest epoch that any trainer of the run came to, and who
that was. A trainer changes files only while it has this file locked and has seen that its own epoch
stands in it. So one that was frozen, lost its lease and is revived changes nothing that belongs to
its successor, wherever in its work it froze; and an epoch never falls, should Redis lose it.

The lock is flock's: the kernel drops it with the process. It holds between all processes of one
machine; docs/delivery.md says what it is worth on a network file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
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
    """One trainer's claim to the files of `run_dir`. For the main thread alone; the file system may
    be without locks, which is said.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE
        self.epoch = 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._depth = 0

    def close(self) -> None:
        """Close the file; the claim stands."""
        os.close(self._file)

    def newest(self) -> int:
        """The highest epoch that a trainer of this run came to; 0 before the first."""
        return self._read()[0]

    def take(self, epoch: int, holder: str) -> None:
        """Claim the files for the trainer of `epoch`. Waits for one that is in the middle of a
        change, and says for whom.

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
        """Change files of the run meanwhile; may be nested.

        Raises:
            LeaseLost: a later trainer has them; nothing was changed.
        """
        with self._locked():
            newest, owner = self._read()
            if newest != self.epoch:
                raise LeaseLost(
                    f"the files of the run are those of epoch {newest}, of {owner}; this trainer's epoch is {self.epoch}"
                )
            yield

    def _read(self) -> tuple[int, str]:
        epoch, _, owner = (
            os.pread(self._file, 4096, 0).decode(errors="replace").strip().partition(" ")
        )
        return (int(epoch), owner) if epoch.isdecimal() else (0, "")

    @contextmanager
    def _locked(self) -> Iterator[None]:
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
                    "the file system of the run has no locks; a trainer revived in the middle of a write is not kept out"
                )
                return
