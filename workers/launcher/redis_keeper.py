"""Keeps the embedded Redis alive: starts it again when it dies, a bounded number of times."""

from __future__ import annotations

import time
from collections.abc import Callable

from onstream.pipeline.errors import Exit, UserError
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.log_tail import last_lines
from onstream.workers.launcher.supervisor import ChildFailed, pause_before_restart_s


class RedisKeeper:
    """Starts `redis` again whenever it is gone; a death while it starts is one like any other.

    After more than `max_restarts` deaths in a row, without progress of the run between them, it
    gives up. `say` is told of each.
    """

    def __init__(self, redis: EmbeddedRedis, max_restarts: int, say: Callable[[str], None]) -> None:
        self._redis = redis
        self._max_restarts = max_restarts
        self._say = say
        self._deaths = 0
        self._progress_at_death = -1
        self._start_at: float | None = None
        self._gave_up = False

    def keep(self, progress: int) -> None:
        """Look after the server; `progress` is any number of the run that grows while it gets on.

        Raises:
            ChildFailed: it died too often. Only once: the caller may still want to drain workers.
        """
        if self._gave_up or self._redis.alive:
            return
        if self._start_at is None:
            self._note_death("the embedded Redis died", progress)
        elif time.monotonic() >= self._start_at:
            self._start(progress)

    def _start(self, progress: int) -> None:
        self._start_at = None
        try:
            self._redis.start()
        except UserError as error:
            self._note_death(error.got, progress)

    def _note_death(self, why: str, progress: int) -> None:
        self._deaths = self._deaths + 1 if progress <= self._progress_at_death else 1
        self._progress_at_death = progress
        if self._deaths > self._max_restarts:
            self._gave_up = True
            times = f", {self._deaths} times in a row without progress of the run"
            log = self._redis.data / "server.log"
            lines = [*last_lines(log), f"(its log: {log})"]
            raise ChildFailed(f"{why}{times}", lines, Exit.FAILED)
        pause_s = pause_before_restart_s(self._deaths)
        self._start_at = time.monotonic() + pause_s
        when = f" in {pause_s:g} s" if pause_s else ""
        self._say(f"{why}; starting it again{when} on {self._redis.data}")
