"""Makes a journal durable beside the work: a thread of its own waits for the disk."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread

PAUSE_S = 0.05
"""Between two syncs, so that one brings many records to the disk."""


class BackgroundSync:
    """Calls `sync` in a thread after each `request`; `sync` returns the position it made durable.

    `durable` is how far that is. A sync that failed is never repeated: the kernel may have given
    up the bytes, and a second one would succeed without them.
    """

    def __init__(self, sync: Callable[[], int]) -> None:
        self._sync = sync
        self._durable = sync()
        self._problem: OSError | None = None
        self._wanted = Event()
        self._closed = Event()
        self._thread = Thread(target=self._run, name="journal-sync", daemon=True)
        self._thread.start()

    @property
    def durable(self) -> int:
        """The position up to which all is durable.

        Raises:
            OSError: a sync failed.
        """
        if self._problem is not None:
            raise self._problem
        return self._durable

    def request(self) -> None:
        """Make what is there now durable, soon."""
        self._wanted.set()

    def now(self) -> None:
        """Make all of it durable before returning.

        Raises:
            OSError: this sync or one before it failed.
        """
        if self._problem is not None:
            raise self._problem
        self._durable = max(self._sync(), self._durable)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closed.is_set():
                return
            try:
                self._durable = max(self._sync(), self._durable)
            except OSError as error:
                self._problem = error
                return
            self._closed.wait(PAUSE_S)
