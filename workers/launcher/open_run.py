"""How a command reaches the Redis of a run that may be standing still."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from onstream.pipeline.redis.bus import Bus, connect, redis_url, running_server
from onstream.settings.record_sizes import max_memory_mib
from onstream.settings.root import Settings
from onstream.workers.launcher.embedded_redis import EmbeddedRedis


@contextlib.contextmanager
def open_run(settings: Settings, *, purpose: str) -> Iterator[Bus]:
    """A bus to look at a run with; `purpose` is part of its name in Redis.

    When the run stands still, its own Redis is started on its data, and stopped at the end.

    Raises:
        UserError: no Redis of the run can be found or started.
    """
    with contextlib.ExitStack() as stack:
        url = _started(settings, stack) if _stands_still(settings) else redis_url(settings)
        bus = connect(settings, url, consumer=f"{purpose}-{os.getpid()}")
        stack.callback(bus.close)
        yield bus


def _stands_still(settings: Settings) -> bool:
    """Whether the run has a Redis of its own, which does not run now."""
    return (
        settings.redis.url is None
        and running_server(settings.run_dir) is None
        and (settings.run_dir / "redis" / "appendonly.aof").exists()
    )


def _started(settings: Settings, stack: contextlib.ExitStack) -> str:
    server = EmbeddedRedis(
        settings.run_dir / "redis",
        max_memory_mb=max_memory_mib(settings),
        server_bin=settings.redis.server_bin,
    )
    stack.callback(server.stop)
    return server.start()
