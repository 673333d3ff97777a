"""The transport `nccl`: what trainer and generators say to each other, over Redis, around vLLM's
transfer from GPU to GPU.

The trainer calls, every receiver answers. A call to `join` has them build one group of all GPUs,
trainer first; a call to `receive` has them take one version from it, into memory beside the model.
The trainer announces a version after all have answered that they hold it.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.transfer_state import TransferState
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError
from onstream.pipeline.weights.safetensors_layout import layout_of, view

if TYPE_CHECKING:
    from torch import Tensor

LOOK_S = 0.01
Kind = Literal["join", "receive"]


class PolicyHeader(msgspec.Struct, frozen=True):
    """Version `number` without its tensors: the head of its safetensors file, in base64, and the
    size and digest of the whole.
    """

    number: int
    digest: str
    size_bytes: int
    head: str

    @classmethod
    def of(cls, policy: LoadedPolicy) -> PolicyHeader:
        """That of `policy`."""
        start = min((entry.start for entry in policy.layout.values()), default=policy.data.size)
        return cls(
            policy.number,
            policy.digest,
            policy.data.size,
            base64.b64encode(policy.data[:start].tobytes()).decode(),
        )


class TransferCall(msgspec.Struct, frozen=True, tag="weights-transfer/1"):
    """What is asked of the receivers in `ranks`, of each for its first GPU the rank in the group.
    `info` is vLLM's own.
    """

    id: str
    kind: Kind
    ranks: dict[str, int]
    info: dict[str, Any]
    frame: PolicyHeader | None = None


class ReceiveBuffer:
    """Stands where vLLM's receiving engine expects a model: keeps what is loaded into it, as the
    file that `frame` is of.
    """

    def __init__(self, frame: PolicyHeader) -> None:
        head = np.frombuffer(base64.b64decode(frame.head), dtype=np.uint8)
        self._frame = frame
        self._data = np.zeros(frame.size_bytes, dtype=np.uint8)
        self._data[: head.size] = head
        self._places = {
            name: view(self._data, entry) for name, entry in layout_of(self._data).items()
        }
        self._missing = set(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are to come, by name."""
        return {name: tuple(place.shape) for name, place in self._places.items()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Keep `weights`, from whatever device; vLLM calls this as often as it likes."""
        for name, tensor in weights:
            self._places[name].copy_(tensor)
            self._missing.discard(name)

    def policy(self) -> LoadedPolicy:
        """What came.

        Raises:
            WeightsError: it is not all, or not what the trainer sent.
        """
        if self._missing:
            raise WeightsError(
                f"{len(self._missing)} tensors of version {self._frame.number} did not come, such as {min(self._missing)}"
            )
        return LoadedPolicy(self._frame.number, self._frame.digest, self._data)


class TransferCoordinator:
    """The trainer's end. Each call waits for every answer, up to `patience_s`."""

    def __init__(self, state: TransferState, lease: Lease, patience_s: float) -> None:
        self._state = state
        self._lease = lease
        self._patience_s = patience_s
        self._calls = 0

    def ranks(self) -> tuple[dict[str, int], int]:
        """The first rank of each receiver alive, the trainer being 0, and the size of the whole
        group.
        """
        ranks = dict[str, int]()
        following = 1
        for name, gpus in self._state.receivers().items():
            ranks[name] = following
            following = following + gpus
        return ranks, following

    def call(
        self,
        kind: Kind,
        ranks: Mapping[str, int],
        info: dict[str, Any],
        frame: PolicyHeader | None = None,
    ) -> None:
        """Ask `kind` of the receivers in `ranks`; returns when all of them have done it.

        Raises:
            WeightsError: one did not, in its own words, or was silent.
            LeaseLost: another trainer took over.
        """
        self._calls += 1
        call = TransferCall(
            f"{self._lease.epoch}.{self._state.consumer}.{self._calls}",
            kind,
            dict(ranks),
            info,
            frame,
        )
        self._state.call(self._lease, msgspec.msgpack.encode(call))
        deadline = time.monotonic() + self._patience_s
        while silent := ranks.keys() - (answers := self._state.answers(call.id)).keys():
            if problems := {name: problem for name, problem in answers.items() if problem}:
                break
            if time.monotonic() > deadline:
                raise WeightsError(
                    f"{', '.join(sorted(silent))} did not answer within {self._patience_s:g} s"
                )
            time.sleep(LOOK_S)
        if problems := {name: problem for name, problem in answers.items() if problem}:
            raise WeightsError(
                "; ".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))
            )
