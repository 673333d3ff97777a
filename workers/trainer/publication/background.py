"""A policy version on its way to the generators, in a thread of its own where it is large."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.redis.connection import OUTAGE
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.file_format import Bytes

WAKES_S = (0.0, 0.05, 0.2)
"""When to wake the main thread, in seconds after the end. A single call might come just before the
main thread begins the read that it should end.
"""

log = get_logger()


class Publication:
    """Runs `publish`, which calls its argument once it reads the weights no more.

    With `wake` it runs in a thread, which calls that when it is done, in case the main thread waits
    for something else. Without, it has run when the constructor returns.

    Whatever `publish` raises is raised by `result`: the main thread decides what becomes of it.
    """

    def __init__(
        self,
        publish: Callable[[Callable[[], None]], PolicyVersion],
        wake: Callable[[], None] | None,
    ) -> None:
        self._publish = publish
        self._policy: PolicyVersion | None = None
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
            thread.name = "onstream-publish"
            thread.start()

    @property
    def done(self) -> bool:
        """Whether the version is out, or has failed."""
        return self._done.is_set()

    def wait_until_copied(self) -> None:
        """Wait until the weights may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait until it is done."""
        self._done.wait()

    def result(self) -> PolicyVersion:
        """The version that was announced; waits for it.

        Raises:
            BaseException: what `publish` raised.
        """
        self._done.wait()
        self._collected.set()
        if self._error is not None:
            raise self._error
        assert self._policy is not None
        return self._policy

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._policy = self._publish(self._copied.set)
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
                log.warning("redis does not answer the publishing thread", error=str(error))
                return


class PolicyBuffers:
    """Memory that one version after the other is copied into.

    Fresh memory costs several times as much as the copy itself: the kernel clears every page.
    """

    def __init__(self) -> None:
        self._all: list[Bytes] = []

    def free(self, in_use: Sequence[Bytes]) -> Bytes | None:
        """A buffer that is not `in_use`; None where there is none."""
        return next((one for one in self._all if not _among(one, in_use)), None)

    def keep(self, buffer: Bytes, in_use: Sequence[Bytes]) -> None:
        """Keep `buffer` for later versions, and of the others those `in_use`."""
        self._all = [buffer, *(one for one in in_use if one is not buffer)]


def _among(buffer: Bytes, others: Sequence[Bytes]) -> bool:
    return any(buffer is one for one in others)
