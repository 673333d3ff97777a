"""How vLLM is started inside a generator: its environment, its arguments, and words for why it
cannot be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import UserError
from onstream.settings import engines
from onstream.settings.devices import device_of
from onstream.settings.engines import vllm_environment
from onstream.settings.gpus import memory_share
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.settings.rules.engines import vllm_missing

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTENSION = "onstream.workers.generator.engines.vllm.extension.Extension"
IN_PROCESS = {
    # a fork would copy the locks that this process's other threads hold
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
WITHOUT_WORKER_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0"
}  # or vLLM would not let the engine's process compute by itself
WORDS = 300  # of vLLM's reasons, which may run over a page


class UnsupportedByVllm(UserError):
    """vLLM does not take this model, or not with these arguments. Nothing was started."""


def configure(settings: Settings, *, images: bool) -> VllmConfig:
    """vLLM's configuration for the student, which reads `images` or not, checked by vLLM itself;
    its weights are not looked at yet.

    Raises:
        NotServed: vLLM does not take the model or an argument.
        SettingsError: vLLM is not installed.
    """
    _prepare(settings)
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from onstream.workers.generator.engines.vllm.extension import BACKEND

    given = arguments(settings, images=images)
    try:
        config: VllmConfig = AsyncEngineArgs(
            **given, weight_transfer_config=WeightTransferConfig(backend=BACKEND)
        ).create_engine_config()
    except (TypeError, ValueError, NotImplementedError, OSError) as error:
        raise UnsupportedByVllm(
            f"vLLM does not take {settings.model.name} with {_shown(given)}: {_reason(error)}",
            expected="a model and arguments that vLLM supports",
            next_step='Mend inference.extra_args, or set inference.engine = "transformers".',
        ) from error
    return config


def arguments(settings: Settings, *, images: bool = False) -> dict[str, Any]:
    """The engine's arguments, for a model that reads `images` or not; those of
    `inference.extra_args` last, so that they win.
    """
    inference = settings.inference
    cpu = device_of(settings.deployment) == "cpu"
    path = Path(settings.model.name).expanduser()
    stated = {
        "model": str(path) if path.is_dir() else settings.model.name,
        "dtype": ("float32" if cpu else "bfloat16")
        if inference.dtype == "auto"
        else inference.dtype,
        "max_num_seqs": inference.max_batch,
        "max_model_len": inference.max_model_len,
        "tensor_parallel_size": inference.tensor_parallel_size,
        "data_parallel_size": inference.data_parallel_size,
        "gpu_memory_utilization": inference.gpu_memory_utilization
        or (None if cpu else memory_share(settings, "generator")),
        "enforce_eager": cpu if inference.enforce_eager is None else inference.enforce_eager,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "worker_extension_cls": EXTENSION,
        "skip_tokenizer_init": not images,  # vLLM's processors of images begin with one
        "generation_config": "vllm",  # not the model's: it would change the sampling
        "disable_log_stats": True,
    }
    if images:
        stated["limit_mm_per_prompt"] = {"image": settings.images.max_per_prompt, "video": 0}
    if cpu:
        # Where a prompt is computed in parts, vLLM winds back the draws of a request with a seed,
        # which generators on a CPU cannot.
        stated["enable_chunked_prefill"] = False
    if inference.on_new_weights == "keep":
        # What is kept for running completions cannot be told from what would be kept for others
        # that begin with the same prompt.
        stated["enable_prefix_caching"] = False
    if cpu and _alone(settings):
        stated["distributed_executor_backend"] = "uni"
    return {
        name: value for name, value in stated.items() if value is not None
    } | inference.extra_args


def did_not_start(error: BaseException, settings: Settings) -> UserError:
    """The words for an engine whose processes came up and went."""
    return UserError(
        f"vLLM did not start with {settings.model.name}: {_reason(error)}",
        expected="an engine that loads the model and finds room for its cache",
        next_step="vLLM's own lines above say why. Where it is memory, lower inference.max_model_len or inference.max_batch, or give "
        "it more by inference.gpu_memory_utilization (on a CPU by the variable VLLM_CPU_KVCACHE_SPACE, in GiB).",
    )


def _alone(settings: Settings) -> bool:
    return settings.inference.tensor_parallel_size == settings.inference.data_parallel_size == 1


def _prepare(settings: Settings) -> None:
    """Set the environment that vLLM reads when it is imported and its processes inherit; what it
    says already stays.
    """
    if not engines.vllm_importable():
        raise SettingsError([vllm_missing("inference.engine")])
    device = device_of(settings.deployment)
    variables = (
        IN_PROCESS
        | vllm_environment(device)
        | (WITHOUT_WORKER_PROCESS if device == "cpu" and _alone(settings) else {})
    )
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    # `python -m` leaves the working directory as "" on the path, which a process that is spawned
    # elsewhere would read anew.
    sys.path[:] = [entry or os.getcwd() for entry in sys.path]


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= WORDS else words[:WORDS] + "…"


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value}"
        for name, value in given.items()
        if name not in ("model", "worker_extension_cls")
    )
