"""How a command reaches the Redis of a run: the configured one, or the one that `onstream up` runs
on the run's data.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.settings.redis import address
from onstream.settings.root import Settings
from onstream.workers.launcher.embedded_redis import ADDRESS, EmbeddedRedis


def redis_url(settings: Settings) -> str:
    """The address of the run's Redis, login included: that of `redis.url`, or that of the server
    that `onstream up` started for this run.

    Raises:
        UserError: none is configured, and no such server runs.
    """
    if (configured := address(settings.redis)) is not None:
        return configured
    if (url := running_server(settings.run_dir)) is not None:
        return url
    raise UserError(
        f"redis.url is unset, and no `onstream up` runs a Redis for {settings.run_dir}",
        expected="the address of the run's Redis",
        next_step="Set redis.url (ONSTREAM_REDIS__URL), or start the run with `onstream up`.",
    )


def running_server(run_dir: Path) -> str | None:
    """The URL of the embedded server that answers for the run in `run_dir`, or None."""
    address = run_dir / "redis" / ADDRESS
    if not address.exists():
        return None
    url = address.read_text().strip()
    client = Redis.from_url(url, socket_timeout=5)
    try:
        client.ping()
    except RedisError:
        return None  # its launcher was killed, and the server with it
    finally:
        client.close()
    return url


def connect(settings: Settings, url: str, *, consumer: str) -> Bus:
    """A bus of the run at `url`, with the settings' own waits.

    Raises:
        UserError: Redis does not answer, or is unfit.
    """
    redis = settings.redis
    return Bus.connect(
        url,
        settings.run.name,
        consumer=consumer,
        block_s=redis.block,
        connect_timeout_s=redis.connect_timeout,
    )


@contextlib.contextmanager
def opened(settings: Settings, *, purpose: str) -> Iterator[Bus]:
    """A bus to look at a run with. When the run stands still, its own Redis is started on its data
    for so long.

    Raises:
        UserError: no Redis of the run can be found or started.
    """
    with contextlib.ExitStack() as stack:
        data = settings.run_dir / "redis"
        if (
            settings.redis.url is None
            and running_server(settings.run_dir) is None
            and (data / "appendonly.aof").exists()
        ):
            server = EmbeddedRedis(
                data, max_memory_mb=settings.redis.max_memory, server_bin=settings.redis.server_bin
            )
            stack.callback(server.stop)
            url = server.start()
        else:
            url = redis_url(settings)
        bus = connect(settings, url, consumer=f"{purpose}-{os.getpid()}")
        stack.callback(bus.close)
        yield bus
