"""The bus: all that a worker or command does with the Redis of one run, and where that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.image_store import ImageStore
from onstream.pipeline.redis.operator_requests import OperatorRequests
from onstream.pipeline.redis.run_state import RunState
from onstream.pipeline.redis.score_store import ScoreStore
from onstream.pipeline.redis.streams import RunLimits, Streams
from onstream.pipeline.redis.trainer_lease import TrainerLease
from onstream.pipeline.redis.transfer_state import TransferState
from onstream.pipeline.redis.weight_store import WeightStore
from onstream.settings.redis import address
from onstream.settings.root import Settings

EMBEDDED_ADDRESS = Path("redis/url")
"""The file in the run directory that holds the address of the server that `onstream up` runs."""


class Bus:
    """One connection, and a part for each kind of thing that a run keeps in Redis.

    `streams` carries the work from stage to stage. `state` is what anybody may read, `limits` which
    numbers and versions the run has come to, `lease` what only the trainer may write, and
    `requests` what operators ask of the trainer. `weights`, `images` and `scores` store bytes;
    `transfer` coordinates weights that go from GPU to GPU.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.run = connection.run
        self.consumer = connection.consumer
        self.keys = connection.keys
        self.streams = Streams(connection)
        self.state = RunState(connection)
        self.limits = RunLimits(connection, self.state.path)
        self.lease = TrainerLease(connection)
        self.requests = OperatorRequests(connection, self.lease)
        self.weights = WeightStore(connection, self.lease)
        self.transfer = TransferState(connection, self.lease, self.state)
        self.images = ImageStore(connection, self.lease)
        self.scores = ScoreStore(connection)

    @classmethod
    def connect(
        cls,
        url: str,
        run: str,
        *,
        consumer: str,
        block_s: float,
        connect_timeout_s: float,
        teachers: Sequence[str] = (),
    ) -> Self:
        """A bus that has reached Redis, where every stream has its group.

        `consumer` names this worker among those of the run; no two living workers may share it.
        `teachers` are those with streams of their own, beside those that the run's plan has.
        `block_s` is the longest that one read will wait. Calls outlive an outage of
        `connect_timeout_s` seconds.

        Raises:
            UserError: Redis does not answer, wants another password, is older than 6.2, or would
                evict keys.
        """
        connection = Connection(
            url, run, consumer=consumer, block_s=block_s, connect_timeout_s=connect_timeout_s
        )
        connection.keys.add_teachers(teachers)
        try:
            connection.check()
            bus = cls(connection)
            if planned := bus.state.teachers():
                connection.keys.add_teachers(planned)
                connection.create_groups()
        except BaseException:
            connection.close()
            raise
        return bus

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


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
    """The URL of the server that `onstream up` runs for the run; None if none answers.

    That of another run does not count: the directory may be a copy of its own.
    """
    address_file = run_dir / EMBEDDED_ADDRESS
    if not address_file.exists():
        return None
    url = address_file.read_text().strip()
    client = Redis.from_url(url, socket_timeout=5)
    try:
        data = client.config_get("dir")["dir"]
    except RedisError:
        return None  # its launcher was killed, and the server with it; the file stayed
    finally:
        client.close()
    return (
        url if Path(str(data)).resolve() == (run_dir / EMBEDDED_ADDRESS).parent.resolve() else None
    )


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
        teachers=tuple(settings.teachers),
    )
