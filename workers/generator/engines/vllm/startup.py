"""How vLLM is started inside a generator: its environment, arguments and start-up errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.tokenizer import has_states
from onstream.pipeline.models.weight_shapes import shapes_of
from onstream.pipeline.vllm_process import prepare_process, reason_of
from onstream.settings.devices import device_of
from onstream.settings.gpus import memory_share
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import UnsupportedModel
from onstream.workers.generator.student import StudentModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from onstream.workers.generator.engines.vllm.engine import VllmEngine

EXTENSION = "onstream.workers.generator.engines.vllm.extension.Extension"


def open_engine(student: StudentModel) -> VllmEngine:
    """vLLM with `student`, in processes of its own.

    Raises:
        UnsupportedModel: vLLM does not take the model or an argument. Nothing was started.
        UserError: vLLM is not installed, or did not start with the model.
    """
    settings = student.settings
    _require_computable(student)
    config = configure(settings, images=student.reads_images, states=has_states(student.config))
    # Imported only now: importing vLLM reads the environment that `configure` has set.
    from onstream.workers.generator.engines.vllm.engine import VllmEngine

    shapes = shapes_of(student.config)
    on_new_weights = settings.inference.on_new_weights
    first = student.test_request()
    try:
        return VllmEngine(
            config, student.stop_ids, shapes, on_new_weights=on_new_weights, first=first
        )
    except UserError:
        raise
    except Exception as error:  # of whatever kind: vLLM's processes ended
        raise did_not_start(error, settings) from error


def configure(settings: Settings, *, images: bool, states: bool = False) -> VllmConfig:
    """vLLM's configuration for the student, checked by vLLM; the weights are not read yet.

    `images` says whether the student reads images, `states` whether some of its layers keep a
    state in place of keys and values.

    Raises:
        NotServed: vLLM does not take the model or an argument.
        SettingsError: vLLM is not installed.
    """
    prepare_process(
        device_of(settings.deployment), alone=_alone(settings), setting="inference.engine"
    )
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    from onstream.workers.generator.engines.vllm.extension import BACKEND

    given = arguments(settings, images=images, states=states)
    try:
        config: VllmConfig = AsyncEngineArgs(
            **given, weight_transfer_config=WeightTransferConfig(backend=BACKEND)
        ).create_engine_config()
    except (TypeError, ValueError, NotImplementedError, OSError) as error:
        raise UnsupportedModel(
            f"vLLM does not take {settings.model.name} with {_shown(given)}: {reason_of(error)}",
            expected="a model and arguments that vLLM supports",
            next_step='Correct inference.extra_args, or set inference.engine = "transformers".',
        ) from error
    return config


def arguments(settings: Settings, *, images: bool = False, states: bool = False) -> dict[str, Any]:
    """The engine's arguments; those of `inference.extra_args` last, so that they win.

    `images` says whether the student reads images, `states` whether some of its layers keep a
    state in place of keys and values.
    """
    inference = settings.inference
    cpu = device_of(settings.deployment) == "cpu"
    dtype: str = inference.dtype
    if dtype == "auto":
        dtype = "float32" if cpu else "bfloat16"
    memory = inference.gpu_memory_utilization
    if memory is None and not cpu:
        memory = memory_share(settings, "generator")
    path = Path(settings.model.name).expanduser()
    stated: dict[str, Any] = {
        "model": str(path) if path.is_dir() else settings.model.name,
        "dtype": dtype,
        "max_num_seqs": inference.max_batch,
        "max_model_len": inference.max_model_len,
        "tensor_parallel_size": inference.tensor_parallel_size,
        "data_parallel_size": inference.data_parallel_size,
        "gpu_memory_utilization": memory,
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
        # Where a prompt is computed in parts, vLLM rewinds the random generator of a request with
        # a seed, and torch's CPU generators cannot be rewound.
        stated["enable_chunked_prefill"] = False
        if states:
            # vLLM keeps the states of prefixes only where it computes prompts in parts.
            stated["enable_prefix_caching"] = False
    if inference.on_new_weights == "keep":
        # vLLM clears either all of its cache or nothing. Prefixes of the old weights would be used
        # for new completions.
        stated["enable_prefix_caching"] = False
    if cpu and _alone(settings):
        stated["distributed_executor_backend"] = "uni"
    given = {name: value for name, value in stated.items() if value is not None}
    return given | inference.extra_args


def did_not_start(error: BaseException, settings: Settings) -> UserError:
    """The error for an engine whose processes started and then ended."""
    return UserError(
        f"vLLM did not start with {settings.model.name}: {reason_of(error)}",
        expected="an engine that loads the model and finds room for its cache",
        next_step="vLLM's own lines above say why. Where it is memory, lower "
        "inference.max_model_len or inference.max_batch, or give it more by "
        "inference.gpu_memory_utilization (on a CPU by the variable VLLM_CPU_KVCACHE_SPACE, "
        "in GiB).",
    )


def _require_computable(student: StudentModel) -> None:
    """Check what vLLM's CPU build says only when its first request ends its process.

    Raises:
        UnsupportedModel: it has no kernel for this model in float32.
    """
    settings = student.settings
    gated_delta_net = hasattr(student.config.get_text_config(), "linear_num_value_heads")
    float32 = arguments(settings)["dtype"] == "float32"
    if device_of(settings.deployment) == "cpu" and gated_delta_net and float32:
        raise UnsupportedModel(
            f"vLLM's CPU build cannot compute {student.name} in float32 "
            '("CPU GDN attention requires BF16.")',
            expected='inference.dtype = "bfloat16" for layers of gated delta nets, as in Qwen3.5',
            next_step="Set it, or choose the built-in engine, which computes in float32: "
            'inference.engine = "transformers".',
        )


def _alone(settings: Settings) -> bool:
    return settings.inference.tensor_parallel_size == settings.inference.data_parallel_size == 1


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {value}"
        for name, value in given.items()
        if name not in ("model", "worker_extension_cls")
    )
