"""What Onstream adds to every vLLM worker process: weights from a file, read and checked before
anything of the model is touched.

vLLM loads this module by name:
`worker_extension_cls="onstream.workers.generator.engines.vllm.extension.Extension"` together with
the weight-transfer backend "disk", in process or as a server (`--worker-extension-cls …
--weight-transfer-config '{"backend": "disk"}'`).

Weights that the trainer sends from GPU to GPU are staged likewise: `onstream_join` and
`onstream_receive` begin what `onstream_staged` tells of.

An update is `collective_rpc("onstream_stage", (path, digest))`, then
`collective_rpc("onstream_staged")` until no worker says that it still reads, while requests go on;
then, under a pause, vLLM's own `start_weight_update`, `update_weights` with an `update_info` of
`path` and `digest`, and `finish_weight_update`. What fails before `update_weights` has left the old
weights in place; where `update_weights` itself fails, the worker may hold some of both and must not
serve on.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from onstream.pipeline.weights import WeightsError, read_file
from onstream.pipeline.weights.nccl_transfer import PolicyHeader
from onstream.workers.generator.engines.vllm.clip_weights import read_either_names
from onstream.workers.generator.engines.vllm.nccl_group import GroupMember

if TYPE_CHECKING:
    from torch import Tensor

BACKEND = "disk"
READING = "reading"
READY = "ready"
RECEIVED = "received"  # the path of what is no file
RELOAD_LOG = "vllm.model_executor.model_loader.reload.layerwise"


class StagedWeights:
    """What `read` gives, in a thread: the tensors of a file, checked, or those received. TP workers
    of one host share a file's memory.
    """

    def __init__(self, path: str, digest: str, read: Callable[[], dict[str, Tensor]]) -> None:
        self.path = path
        self.digest = digest
        self._reads = read
        self._tensors: dict[str, Tensor] = {}
        self._problem = ""
        self._thread = threading.Thread(target=self._read, name="onstream-stage", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """`reading`, `ready`, or why the file cannot be used."""
        return READING if self._thread.is_alive() else self._problem or READY

    def tensors(self) -> dict[str, Tensor]:
        """What was read, once it is.

        Raises:
            WeightsError: the file is missing or is not the one with that digest.
        """
        self._thread.join()
        if self._problem:
            raise WeightsError(self._problem)
        return self._tensors

    def _read(self) -> None:
        try:
            self._tensors = self._reads()
        except WeightsError as error:
            self._problem = str(error)


@dataclass
class NoInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """A file needs no connection."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A safetensors file that this worker can read, and the sha256 of its bytes."""

    path: str
    digest: str


class FileTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """vLLM's weight-transfer backend "disk": a whole checkpoint file at a time, through the
    layerwise reload.

    Plain `load_weights` fails halfway on CPUs, where the linear layers keep their weights in a
    packed form only.
    """

    init_info_cls = NoInitInfo
    update_info_cls = FileUpdateInfo
    staged: StagedWeights | None = None
    member: GroupMember | None = None

    def stage(self, path: str, digest: str) -> StagedWeights:
        """Begin to read a file, unless it is the one that was read last."""
        if (
            self.staged is None
            or (self.staged.path, self.staged.digest) != (path, digest)
            or self.staged.state not in (READING, READY)
        ):
            self.staged = StagedWeights(path, digest, lambda: read_file(Path(path), digest))
        return self.staged

    def begin(self, digest: str, read: Callable[[GroupMember], dict[str, Tensor]]) -> None:
        """Have a thread do `read`, in the group of the trainer and all generators."""
        member = self.member = self.member or GroupMember(self)
        self.staged = StagedWeights(RECEIVED, digest, lambda: read(member))

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to connect to: the group is joined by `begin`, beside the requests."""

    def start_weight_update(self) -> None:
        """Nothing yet: from the first touch on, the layers hold neither the old weights nor the new
        ones.
        """

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Replace the model's weights.

        Raises:
            WeightsError: the file cannot be used, and nothing was touched.
        """
        tensors = self.stage(update_info.path, update_info.digest).tensors()
        self.staged = None
        with _quiet_reload():
            initialize_layerwise_reload(self.model)
            self.model.load_weights(tensors.items())
            finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left to do: `receive_weights` takes whole files."""

    def shutdown(self) -> None:
        """Let go of a file that was read and not used, and of the group."""
        self.staged = None
        if self.member is not None:
            self.member.leave()


class Extension:
    """Methods of every worker process, for vLLM's `collective_rpc`; all their arguments and results
    are strings.
    """

    def onstream_stage(self: Any, path: str, digest: str) -> None:
        """Begin to read `path` and compare it with `digest`, its sha256; returns at once."""
        self.weight_transfer_engine.stage(path, digest)

    def onstream_join(self: Any, init_info: str) -> None:
        """Begin to join the group that vLLM's `init_info` describes, in JSON; returns at once, and
        `onstream_staged` tells of it.
        """
        info = json.loads(init_info)
        self.weight_transfer_engine.begin("", lambda member: member.join(info))

    def onstream_receive(self: Any, update_info: str, frame: str) -> None:
        """Begin to receive the version of `frame` over the group, as vLLM's `update_info` says,
        both in JSON; returns at once.
        """
        info = json.loads(update_info)
        version = msgspec.json.decode(frame, type=PolicyHeader)
        self.weight_transfer_engine.begin(
            version.digest, lambda member: member.receive(info, version)
        )

    def onstream_leave(self: Any) -> None:
        """Leave the group, and abort what it still does."""
        self.weight_transfer_engine.shutdown()

    def onstream_staged(self: Any) -> str:
        """`reading`, `ready`, or why the file named last cannot be used."""
        staged = self.weight_transfer_engine.staged
        return staged.state if staged is not None else "nothing was staged"


def repack_tied_head(model: Any) -> None:
    """Compute anew what CPU kernels keep of an output head.

    A checkpoint of a tied model has no weights for the head, so no reload does this: a new body
    would go on with the old head.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _quiet_reload() -> Iterator[None]:
    """Keep the reload from warning at every update that a tied head has no weights in the file, as
    it should.
    """
    log = logging.getLogger(RELOAD_LOG)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


read_either_names()
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransferEngine)
