"""How the trainer and the generators agree on a transfer of weights from GPU to GPU."""

from __future__ import annotations

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.run_state import RunState
from onstream.pipeline.redis.trainer_lease import TrainerLease

ANSWERS_KEPT_S = 600


class TransferState:
    """What `weights.transport = "nccl"` asks of Redis: who receives, what the trainer asks of them,
    what each answers.
    """

    def __init__(self, connection: Connection, lease: TrainerLease, state: RunState) -> None:
        self.consumer = connection.consumer
        self._connection = connection
        self._keys = connection.keys
        self._lease = lease
        self._state = state

    def register_receiver(self, gpus: int) -> None:
        """Note that this worker receives weights, over so many GPUs."""
        self._connection.ask("HSET", self._keys.receivers, self.consumer, gpus)

    def receivers(self) -> dict[str, int]:
        """The living workers that receive weights, by name, with their number of GPUs."""
        alive = {state.worker for state in self._state.workers()}
        said = {
            name.decode(): int(gpus)
            for name, gpus in self._connection.ask("HGETALL", self._keys.receivers).items()
        }
        return {name: said[name] for name in sorted(said) if name in alive}

    def call(self, lease: Lease, call: bytes) -> None:
        """Ask something of the receivers, in place of what was asked before.

        Raises:
            LeaseLost: another trainer took over.
        """
        self._lease.fenced(scripts.SET_KEY, lease, [self._keys.transfer], [call])

    def current_call(self) -> bytes | None:
        """What the trainer asked last."""
        call: bytes | None = self._connection.ask("GET", self._keys.transfer)
        return call

    def answer(self, call: str, problem: str) -> None:
        """Answer the call of that name: it is done, or why it is not."""
        key = self._keys.transfer_answers(call)
        self._connection.ask("HSET", key, self.consumer, problem)
        self._connection.ask("EXPIRE", key, ANSWERS_KEPT_S)

    def answers(self, call: str) -> dict[str, str]:
        """The answers that have come, by worker: "" where it is done, else the problem."""
        return {
            name.decode(): problem.decode()
            for name, problem in self._connection.ask(
                "HGETALL", self._keys.transfer_answers(call)
            ).items()
        }

    def request_file(self, digest: str) -> None:
        """Ask the trainer for the version with `digest` as a file."""
        self._connection.ask("SET", self._keys.wanted_weights, digest)

    def requested_file(self) -> str:
        """The digest of the version that a generator asked for last; "" when none did."""
        return (self._connection.ask("GET", self._keys.wanted_weights) or b"").decode()
