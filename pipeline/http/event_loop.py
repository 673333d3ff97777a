"""An event loop in a thread of its own, for workers whose own loop is not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
END_S = 5.0


class EventLoopThread:
    """Runs coroutines.

    Consumes coroutines; waits for them and for their input and output; is unblocked by `submit`,
    `run` and `stop`; produces futures.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the wait for it is interrupted."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self, last: Callable[[], Awaitable[None]], *, within_s: float = END_S) -> None:
        """Cancel what runs, wait for `last` up to `within_s`, and end the thread."""
        self.submit(_end(last)).result(within_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_S)
        self._loop.close()


async def _end(last: Callable[[], Awaitable[None]]) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await last()
    await asyncio.sleep(0)  # a closed connection releases its socket in the loop's next turn
