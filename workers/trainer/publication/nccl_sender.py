"""The trainer's end of the transport `nccl`. It has never run on a GPU.

vLLM's weight transfer does the sending. What its trainer side would tell a vLLM server over HTTP
goes to the generators over Redis.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from onstream.pipeline.errors import LeaseLost
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.pipeline.weights.nccl_transfer import PolicyHeader, TransferCoordinator

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
log = get_logger()


class TransferEngine(Protocol):
    """What is used of vLLM's trainer side, once its group is built."""

    def send_weights(self) -> None:
        """Send the source's weights to all of the group."""
        ...

    def shutdown(self) -> None:
        """Leave the group, and abort what it still does."""
        ...


class RedisSyncClient:
    """A `VLLMWeightSyncClient` whose calls go to the generators in `ranks`.

    They keep what they receive beside the model, and load it when the version is announced. So
    there is no update to start or finish here.
    """

    def __init__(self, coordinator: TransferCoordinator, ranks: Mapping[str, int]) -> None:
        self._coordinator = coordinator
        self._ranks = ranks
        self.policy: LoadedPolicy | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let all of them join the group."""
        self._coordinator.call("join", self._ranks, init_info)

    def start_weight_update(self) -> None:
        """Nothing to start."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let all of them receive the version that is being sent."""
        assert self.policy is not None
        self._coordinator.call("receive", self._ranks, update_info, PolicyHeader.of(self.policy))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing to finish."""


OpenEngine = Callable[[RedisSyncClient, str, int], TransferEngine]
"""Builds the group with a client, the trainer's address, and the number of GPUs in it."""


class NcclTransfer:
    """Sends versions to all generators that receive.

    The group is built when the first version is sent. It is built again when other generators
    receive, and after a failure.

    Args:
        coordinator: calls the generators over Redis.
        address: where they reach this machine.
        patience_s: how long joining and receiving may take, each.
        open_engine: builds the group; vLLM's own by default.
    """

    def __init__(
        self,
        coordinator: TransferCoordinator,
        address: str,
        patience_s: float,
        open_engine: OpenEngine | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._address = address
        self._patience_s = patience_s
        self._open_engine = open_engine or open_vllm_engine
        self._ranks: dict[str, int] = {}
        self._client: RedisSyncClient | None = None
        self._engine: TransferEngine | None = None

    def send(self, policy: LoadedPolicy) -> bool:
        """Send `policy`; returns whether all generators hold it now.

        Where they do not, the log says why, and the weights that they had are untouched.

        Raises:
            LeaseLost: another trainer took over.
        """
        ranks, size = self._coordinator.ranks()
        if not ranks:
            return False
        try:
            if ranks != self._ranks:
                self.close()
                self._open(ranks, size)
            assert self._engine is not None and self._client is not None
            self._client.policy = policy
            _within(self._patience_s, self._engine.send_weights)
        except LeaseLost:
            raise
        except Exception as error:  # vLLM and NCCL raise what they like
            log.warning(
                "a transfer of weights failed; they go by file instead",
                version=policy.number,
                reason=str(error),
            )
            self.close()
            return False
        return True

    def close(self) -> None:
        """Leave the group."""
        if self._engine is not None:
            self._engine.shutdown()
        self._ranks = {}
        self._client = None
        self._engine = None

    def _open(self, ranks: dict[str, int], size: int) -> None:
        client = RedisSyncClient(self._coordinator, ranks)
        self._engine = _within(
            self._patience_s, lambda: self._open_engine(client, self._address, size)
        )
        self._client = client
        self._ranks = ranks


def open_vllm_engine(client: RedisSyncClient, address: str, size: int) -> TransferEngine:
    """vLLM's own engine, in a group of `size` GPUs."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class PublishedWeights(WeightSource):  # type: ignore[misc]
        """The version that the client is told of."""

        def metadata(self) -> list[ParamMeta]:
            return [
                ParamMeta(name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in self._tensors()
            ]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return ((name, tensor.cuda()) for name, tensor in self._tensors())

        def _tensors(self) -> list[tuple[str, Tensor]]:
            assert client.policy is not None
            return list(client.policy.tensors().items())

    info = NCCLTrainerInitInfo(
        master_address=address, master_port=_free_port(address), world_size=size, rank=0
    )
    engine: TransferEngine = WeightTransferTrainerFactory.trainer_init(
        info, client=client, source=PublishedWeights()
    )
    return engine


def address_towards(redis_url: str) -> str:
    """This machine's address on the way to Redis, which the generators use too."""
    url = urlsplit(redis_url)
    address = (url.hostname or "localhost", url.port or 6379)
    with socket.create_connection(address, timeout=5) as connection:
        return str(connection.getsockname()[0])


def _free_port(address: str) -> int:
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])


def _within(patience_s: float, call: Callable[[], T]) -> T:
    """What `call` returns, within `patience_s` seconds.

    It runs in a thread that is left behind where it takes longer: NCCL may wait for a dead process
    for ever, and nothing can interrupt it.

    Raises:
        WeightsError: it took longer.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="onstream-transfer", daemon=True).start()
    try:
        return done.result(timeout=patience_s)
    except TimeoutError as error:
        raise WeightsError(f"not done within {patience_s:g} s") from error
