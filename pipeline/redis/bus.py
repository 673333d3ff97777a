"""The bus: everything that one worker or command does with the Redis of one run."""

from __future__ import annotations

from typing import Self

from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.image_store import ImageStore
from onstream.pipeline.redis.operator_requests import OperatorRequests
from onstream.pipeline.redis.run_state import RunState
from onstream.pipeline.redis.score_store import ScoreStore
from onstream.pipeline.redis.streams import Streams
from onstream.pipeline.redis.trainer_lease import TrainerLease
from onstream.pipeline.redis.transfer_state import TransferState
from onstream.pipeline.redis.weight_store import WeightStore


class Bus:
    """One connection, and a part for each kind of thing that a run keeps in Redis.

    `streams` carries the work from stage to stage. `state` is what anybody may read, `lease` what
    only the trainer may write, and `requests` what operators ask of the trainer. `weights`,
    `images` and `scores` store bytes; `transfer` coordinates weights that go from GPU to GPU.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.run = connection.run
        self.consumer = connection.consumer
        self.keys = connection.keys
        self.streams = Streams(connection)
        self.state = RunState(connection)
        self.lease = TrainerLease(connection)
        self.requests = OperatorRequests(connection, self.lease)
        self.weights = WeightStore(connection, self.lease)
        self.transfer = TransferState(connection, self.lease, self.state)
        self.images = ImageStore(connection, self.lease)
        self.scores = ScoreStore(connection)

    @classmethod
    def connect(
        cls, url: str, run: str, *, consumer: str, block_s: float, connect_timeout_s: float
    ) -> Self:
        """A bus that has reached Redis, where every stream has its group.

        `consumer` names this worker among those of the run; no two living workers may share it.
        `block_s` is the longest that one read will wait. Calls outlive an outage of
        `connect_timeout_s` seconds.

        Raises:
            UserError: Redis does not answer, wants another password, is older than 6.2, or would
                evict keys.
        """
        connection = Connection(
            url, run, consumer=consumer, block_s=block_s, connect_timeout_s=connect_timeout_s
        )
        try:
            connection.check()
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
