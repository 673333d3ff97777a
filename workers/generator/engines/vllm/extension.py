"""What Onstream adds to every vLLM worker process: weights from a file, checked before loading.

vLLM loads this module by name:
`worker_extension_cls="onstream.workers.generator.engines.vllm.extension.Extension"`, together with
the weight-transfer backend "disk", in process or in a server (`--worker-extension-cls …
--weight-transfer-config '{"backend": "disk"}'`).

An update is:

1. while requests go on, `collective_rpc("onstream_stage", (path, digest))`, and
   `collective_rpc("onstream_staged")` until no worker is still reading;
2. under a pause, vLLM's own `start_weight_update`, `update_weights` with an `update_info` of `path`
   and `digest`, and `finish_weight_update`.

What fails before `update_weights` leaves the old weights in place. Where `update_weights` itself
fails, the worker may have some of both and must not go on.

Weights that the trainer sends from GPU to GPU are staged by `onstream_join` and `onstream_receive`
instead; `onstream_staged` tells of those too.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
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
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _layerwise_process,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader

from onstream.pipeline.weights import WeightsError, read_file
from onstream.pipeline.weights.nccl_transfer import PolicyHeader
from onstream.workers.generator.engines.vllm.nccl_group import GroupMember

if TYPE_CHECKING:
    from torch import Tensor

BACKEND = "disk"
READING = "reading"
READY = "ready"
RECEIVED = "received"  # stands for a path where weights were received
CLIP_PREFIX = "vision_model."  # of the weights of a CLIP tower in older files
RELOAD_LOG = "vllm.model_executor.model_loader.reload.layerwise"


class StagedWeights:
    """Tensors that a thread reads from a file and checks, or receives.

    Tensor-parallel workers of one host share the memory of a file.
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
        """`reading`, `ready`, or why the weights cannot be used."""
        if self._thread.is_alive():
            return READING
        return self._problem or READY

    def tensors(self) -> dict[str, Tensor]:
        """What was read. Waits until it is.

        Raises:
            WeightsError: the file is missing, or does not have that digest.
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
    """Nothing: a file needs no connection."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A safetensors file that this worker can read, and the digest of its weights."""

    path: str
    digest: str


class FileTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """vLLM's weight-transfer backend "disk": a whole file at a time, by the layerwise reload.

    Plain `load_weights` fails halfway on CPUs, where linear layers keep only packed weights.
    """

    init_info_cls = NoInitInfo
    update_info_cls = FileUpdateInfo
    staged: StagedWeights | None = None
    member: GroupMember | None = None

    def stage(self, path: str, digest: str) -> StagedWeights:
        """Begin to read a file, unless it is staged already."""
        staged = self.staged
        usable = (
            staged is not None
            and (staged.path, staged.digest) == (path, digest)
            and staged.state in (READING, READY)
        )
        if staged is None or not usable:
            staged = StagedWeights(path, digest, lambda: read_file(Path(path), digest))
        self.staged = staged
        return staged

    def begin(self, digest: str, read: Callable[[GroupMember], dict[str, Tensor]]) -> None:
        """Let a thread do `read` with this process's member of the trainer's group."""
        member = self.member = self.member or GroupMember(self)
        self.staged = StagedWeights(RECEIVED, digest, lambda: read(member))

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to connect to: the group is joined by `begin`, beside the requests."""

    def start_weight_update(self) -> None:
        """Nothing: once it begins, the layers have neither the old weights nor the new ones."""

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Replace the model's weights.

        Raises:
            WeightsError: the file cannot be used, and nothing was touched.
        """
        tensors = self.stage(update_info.path, update_info.digest).tensors()
        self.staged = None
        with _quiet_reload():
            initialize_layerwise_reload(self.model)
            copied = layers_loaded_directly(self.model)
            for layer in copied:
                materialize_layer(layer, get_layerwise_info(layer))
            self.model.load_weights(tensors.items())
            for layer in copied:
                _layerwise_process(layer, get_layerwise_info(layer))
            finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left to do: `receive_weights` takes whole files."""

    def shutdown(self) -> None:
        """Drop a file that was read and not used, and leave the group."""
        self.staged = None
        if self.member is not None:
            self.member.leave()


class Extension:
    """Methods of every worker process, for vLLM's `collective_rpc`.

    All their arguments and results are strings.
    """

    def onstream_stage(self: Any, path: str, digest: str) -> None:
        """Begin to read `path` and to compare it with `digest`, its weights'; returns at once."""
        self.weight_transfer_engine.stage(path, digest)

    def onstream_join(self: Any, init_info: str) -> None:
        """Begin to join the group that vLLM's `init_info`, JSON, describes.

        Returns at once; `onstream_staged` tells when it is done.
        """
        info = json.loads(init_info)
        self.weight_transfer_engine.begin("", lambda member: member.join(info))

    def onstream_receive(self: Any, update_info: str, header: str) -> None:
        """Begin to receive the version of `header` over the group, as vLLM's `update_info` says.

        Both are JSON. Returns at once.
        """
        info = json.loads(update_info)
        version = msgspec.json.decode(header, type=PolicyHeader)
        self.weight_transfer_engine.begin(
            version.digest, lambda member: member.receive(info, version)
        )

    def onstream_leave(self: Any) -> None:
        """Leave the group, and abort what it is doing."""
        self.weight_transfer_engine.shutdown()

    def onstream_staged(self: Any) -> str:
        """`reading`, `ready`, or why what was staged last cannot be used."""
        staged = self.weight_transfer_engine.staged
        return staged.state if staged is not None else "nothing was staged"


def repack_tied_head(model: Any) -> None:
    """Pack the output head of a tied model again, which CPU kernels keep in a form of their own.

    A checkpoint of a tied model has no weights for the head, so no reload does this, and the new
    weights would be used with the old head.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def layers_loaded_directly(model: Any) -> list[Any]:
    """The layers that `model` copies weights into without their weight loaders.

    vLLM's reload empties a layer and fills it through those. Its loader of gpt-oss passes them by
    for experts and sinks: what it copied would be lost, and the old ones stay.
    """
    if type(model).__name__ != "GptOssForCausalLM":
        return []
    modules = list(model.modules())
    return [layer for layer in modules if {"w13_weight", "sinks"} & layer._parameters.keys()]


def pack_experts_after_every_update() -> None:
    """Make vLLM pack the weights of experts again after an update, as its CPU kernel takes them.

    vLLM 0.32 packs them after the first load alone. An updated model is then off by nats without an
    error, since packed weights have the same shape.
    """
    UnquantizedFusedMoEMethod.process_weights_after_loading = _process_and_pack


_process_experts = UnquantizedFusedMoEMethod.process_weights_after_loading


def _process_and_pack(method: Any, layer: Any) -> None:
    is_update = method.moe_kernel is not None
    _process_experts(method, layer)
    if is_update and method.unquantized_backend == UnquantizedMoeBackend.CPU:
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def read_either_clip_names() -> None:
    """Make vLLM load a CLIP vision tower by its weights' older names and by its newer ones.

    vLLM 0.32 knows only the older ones, which are all under `vision_model`. transformers 5 writes
    them without it, and so do the trainer's updates.
    """
    CLIPVisionModel.load_weights = _load_clip_tower


def _load_clip_tower(tower: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load the tower; returns the names of what was loaded."""
    renamed = ((_older_clip_name(name), weight) for name, weight in weights)
    loaded: set[str] = AutoWeightsLoader(tower).load_weights(renamed)
    return loaded


def _older_clip_name(name: str) -> str:
    return name if name.startswith(CLIP_PREFIX) else CLIP_PREFIX + name


@contextmanager
def _quiet_reload() -> Iterator[None]:
    """Silence the reload's warning that a tied head is not in the file: it need not be."""
    log = logging.getLogger(RELOAD_LOG)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


read_either_clip_names()
pack_experts_after_every_update()
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransferEngine)
