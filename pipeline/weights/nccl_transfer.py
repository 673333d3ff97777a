"""Never run on a GPU. The transport `nccl`: what trainer and generators agree on, over Redis.

vLLM's transfer sends the weights from GPU to GPU. The trainer calls, and every receiver answers. A
call to `join` asks them to build one group of all GPUs, trainer first. A call to `receive` asks
them to take one version from it, into memory beside the model. The trainer announces a version
after all have answered that they have it.
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
from onstream.pipeline.weights.file_format import layout_of, view
from onstream.pipeline.weights.policy import LoadedPolicy, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

POLL_S = 0.01
CallKind = Literal["join", "receive"]


class PolicyHeader(msgspec.Struct, frozen=True):
    """Version `number` without its tensors.

    `head` is the start of its safetensors file up to the first tensor, in base64. `size_bytes` is
    that of the whole file.
    """

    number: int
    digest: str
    size_bytes: int
    head: str

    @classmethod
    def of(cls, policy: LoadedPolicy) -> PolicyHeader:
        """The header of `policy`."""
        starts = [location.start for location in policy.layout.values()]
        head = policy.data[: min(starts, default=policy.data.size)]
        return cls(
            number=policy.number,
            digest=policy.digest,
            size_bytes=policy.data.size,
            head=base64.b64encode(head.tobytes()).decode(),
        )


class TransferCall(msgspec.Struct, frozen=True, tag="weights-transfer/1"):
    """What the trainer asks of the receivers in `ranks`.

    `ranks` gives for each receiver the rank of its first GPU in the group. `info` is vLLM's own.
    """

    id: str
    kind: CallKind
    ranks: dict[str, int]
    info: dict[str, Any]
    header: PolicyHeader | None = msgspec.field(default=None, name="frame")


class ReceiveBuffer:
    """Stands where vLLM's receiving engine expects a model, and keeps what is loaded into it.

    The result is the safetensors file that `header` describes.
    """

    def __init__(self, header: PolicyHeader) -> None:
        head = np.frombuffer(base64.b64decode(header.head), dtype=np.uint8)
        self._header = header
        self._data = np.zeros(header.size_bytes, dtype=np.uint8)
        self._data[: head.size] = head
        self._tensors = {
            name: view(self._data, location) for name, location in layout_of(self._data).items()
        }
        self._missing = set(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the expected tensors, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Keep `weights`, from any device. vLLM calls this as often as it likes."""
        for name, tensor in weights:
            self._tensors[name].copy_(tensor)
            self._missing.discard(name)

    def policy(self) -> LoadedPolicy:
        """What was received.

        Raises:
            WeightsError: it is not all, or not what the trainer sent.
        """
        if self._missing:
            raise WeightsError(
                f"{len(self._missing)} tensors of version {self._header.number} did not come, "
                f"such as {min(self._missing)}"
            )
        return LoadedPolicy(self._header.number, self._header.digest, self._data)


class TransferCoordinator:
    """The trainer's end. Each call waits for every answer, up to `patience_s`."""

    def __init__(self, state: TransferState, lease: Lease, patience_s: float) -> None:
        self._state = state
        self._lease = lease
        self._patience_s = patience_s
        self._calls = 0

    def ranks(self) -> tuple[dict[str, int], int]:
        """The first rank of each receiver alive, and the size of the group; the trainer is 0."""
        ranks = dict[str, int]()
        next_rank = 1
        for name, gpus in self._state.receivers().items():
            ranks[name] = next_rank
            next_rank += gpus
        return ranks, next_rank

    def call(
        self,
        kind: CallKind,
        ranks: Mapping[str, int],
        info: dict[str, Any],
        header: PolicyHeader | None = None,
    ) -> None:
        """Ask `kind` of the receivers in `ranks`; returns when all of them have done it.

        Raises:
            WeightsError: one of them could not, with its reason, or did not answer.
            LeaseLost: another trainer took over.
        """
        self._calls += 1
        call = TransferCall(
            id=f"{self._lease.epoch}.{self._state.consumer}.{self._calls}",
            kind=kind,
            ranks=dict(ranks),
            info=info,
            header=header,
        )
        self._state.call(self._lease, msgspec.msgpack.encode(call))
        deadline = time.monotonic() + self._patience_s
        while True:
            answers = self._state.answers(call.id)
            _raise_problems(answers)
            silent = sorted(ranks.keys() - answers.keys())
            if not silent:
                return
            if time.monotonic() > deadline:
                raise WeightsError(
                    f"{', '.join(silent)} did not answer within {self._patience_s:g} s"
                )
            time.sleep(POLL_S)


def _raise_problems(answers: Mapping[str, str]) -> None:
    problems = [f"{name}: {problem}" for name, problem in sorted(answers.items()) if problem]
    if problems:
        raise WeightsError("; ".join(problems))
