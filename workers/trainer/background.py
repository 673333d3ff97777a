"""Work of the trainer in a thread of its own, while the next step is computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from onstream.pipeline.redis.connection import OUTAGE
from onstream.pipeline.telemetry import get_logger

T = TypeVar("T")

BACKGROUND_BYTES = 32 << 20
"""Work on at least so many bytes is done in a thread; less takes no longer than a thread costs."""
WAKES_S = (0.0, 0.05, 0.2)
"""When to wake the main thread, in seconds after the end. A single call might come just before the
main thread begins the read that it should end.
"""

log = get_logger()


class BackgroundTask(Generic[T]):
    """Runs `work`, which calls its argument once it reads the learner's tensors no more.

    With `wake` it runs in a thread, which calls that when it is done, in case the main thread waits
    for something else. Without, it has run when the constructor returns.

    Whatever `work` raises is raised by `result`: the main thread decides what becomes of it.
    """

    name = "onstream-background"

    def __init__(
        self, work: Callable[[Callable[[], None]], T], wake: Callable[[], None] | None
    ) -> None:
        self._work = work
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._done = threading.Event()
        self._collected = threading.Event()
        self.seconds = 0.0
        """How long it took, once it is done."""
        if wake is None:
            self._run()
        else:
            arguments = (wake,)
            # A daemon: a trainer that must end ends, like a killed one.
            thread = threading.Thread(target=self._run_and_wake, args=arguments, daemon=True)
            thread.name = self.name
            thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, or has failed."""
        return self._done.is_set()

    def wait_until_copied(self) -> None:
        """Wait until the learner's tensors may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait until it is done."""
        self._done.wait()

    def result(self) -> T:
        """What `work` returned; waits for it.

        Raises:
            BaseException: what `work` raised.
        """
        self._done.wait()
        self._collected.set()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._results.append(self._work(self._copied.set))
        except BaseException as error:  # of whatever kind: it is the main thread's
            self._error = error
        self.seconds = time.monotonic() - started
        self._copied.set()
        self._done.set()

    def _run_and_wake(self, wake: Callable[[], None]) -> None:
        self._run()
        for pause_s in WAKES_S:
            if self._collected.wait(pause_s):
                return
            try:
                wake()
            except OUTAGE as error:
                log.warning("redis does not answer a thread of the trainer", error=str(error))
                return
