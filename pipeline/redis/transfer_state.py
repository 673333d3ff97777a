"""How the trainer and the generators agree on a transfer of weights that does not itself go through
Redis.
"""

from __future__ import annotations

from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.run_state import Board
from onstream.pipeline.redis.trainer_lease import Authority, Lease

ANSWERS_KEPT_S = 600


class TransferBoard(Board, Authority):
    """What `weights.transport = "nccl"` asks of Redis: who receives, what the trainer asks of them,
    what each answers.
    """

    def receive_weights(self, gpus: int) -> None:
        """Say that this worker receives weights, over so many GPUs."""
        self._ask("HSET", self.keys.receivers, self.consumer, gpus)

    def receivers(self) -> dict[str, int]:
        """The workers alive that receive, by name, with their numbers of GPUs."""
        alive = {state.worker for state in self.workers()}
        said = {
            name.decode(): int(gpus)
            for name, gpus in self._ask("HGETALL", self.keys.receivers).items()
        }
        return {name: said[name] for name in sorted(said) if name in alive}

    def call_receivers(self, lease: Lease, call: bytes) -> None:
        """Ask something of the receivers, in place of whatever was asked before.

        Raises:
            LeaseLost: another trainer took over.
        """
        self._fenced(scripts.SET_KEY, lease, [self.keys.transfer], [call])

    def transfer_call(self) -> bytes | None:
        """What the trainer asked last."""
        call: bytes | None = self._ask("GET", self.keys.transfer)
        return call

    def answer_transfer(self, call: str, problem: str) -> None:
        """Answer the call of that name: it is done, or why it is not."""
        key = self.keys.transfer_answers(call)
        self._ask("HSET", key, self.consumer, problem)
        self._ask("EXPIRE", key, ANSWERS_KEPT_S)

    def transfer_answers(self, call: str) -> dict[str, str]:
        """The answers that have come, by worker: empty words for what is done."""
        return {
            name.decode(): problem.decode()
            for name, problem in self._ask("HGETALL", self.keys.transfer_answers(call)).items()
        }

    def want_weights(self, digest: str) -> None:
        """Ask the trainer for the version with `digest` as a file."""
        self._ask("SET", self.keys.wanted_weights, digest)

    def wanted_weights(self) -> str:
        """The digest of the version that a generator asked for last; nothing where none did."""
        return (self._ask("GET", self.keys.wanted_weights) or b"").decode()
