"""Where the Redis of a run is: at the configured address, or where `onstream up` runs one."""

from __future__ import annotations

from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.settings.redis import address
from onstream.settings.root import Settings

EMBEDDED_ADDRESS = Path("redis/url")
"""The file in the run directory that holds the address of the server that `onstream up` runs."""


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
    """The URL of the server that `onstream up` runs for the run; None if none answers."""
    address_file = run_dir / EMBEDDED_ADDRESS
    if not address_file.exists():
        return None
    url = address_file.read_text().strip()
    client = Redis.from_url(url, socket_timeout=5)
    try:
        client.ping()
    except RedisError:
        return None  # its launcher was killed, and the server with it; the file stayed
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
