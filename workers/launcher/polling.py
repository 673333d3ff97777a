"""A thread that looks at something again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable

LEAVE_S = 2.0


class PollingThread:
    """Calls `look` every `interval_s`.

    In a thread because what it asks may hang, and must not stop the supervision of the workers.

    Consumes what `look` reads; waits for that and its interval; is unblocked by `stop`; produces
    what `look` leaves behind.
    """

    def __init__(self, name: str, interval_s: float, look: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._look = look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that hangs with what it asks is left behind."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(LEAVE_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(self._interval_s)
