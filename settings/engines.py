"""Which engine writes the rollouts and which one scores for the teacher, and what vLLM is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from onstream.settings.devices import device_of
from onstream.settings.extras import installed
from onstream.settings.root import Settings
from onstream.settings.sections.inference import EngineName, TeacherEngineName
from onstream.settings.stages import WorkerKind

IN_PROCESS: TeacherEngineName = "vllm-in-process"

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
"""Arguments of vLLM's engine that `inference.extra_args` may not hold, and the settings that they
come from, if any."""

TAKEN_FLAGS = {
    "--model": "teacher_inference.model.name",
    "--served-model-name": "teacher_inference.model.name",
    "--tensor-parallel-size": "deployment.num_teacher_gpus",
    "-tp": "deployment.num_teacher_gpus",
    "--host": "",
    "--port": "",
    "--uds": "",
    "--api-key": "",
}
"""Flags of vLLM's server that `teacher_inference.extra_args` may not hold, and the settings that
they come from, if any."""


def vllm_importable() -> bool:
    """Whether vLLM is installed here."""
    return installed("vllm")


def student_engine(settings: Settings) -> EngineName:
    """The engine that writes rollouts, as far as it is known before the model is looked at.

    With `auto`, a model that vLLM does not know is left to transformers later.
    """
    if settings.inference.engine != "auto":
        return settings.inference.engine
    return _vllm_on_gpus(settings)


def teacher_engine(settings: Settings) -> TeacherEngineName:
    """What scores for the teacher beside the run, if there is one."""
    if settings.teacher_inference.engine != "auto":
        return settings.teacher_inference.engine
    return _vllm_on_gpus(settings)


def starts_vllm(kind: WorkerKind, settings: Settings) -> bool:
    """Whether a worker of `kind` starts vLLM, in processes under its own."""
    if kind == "generator":
        return student_engine(settings) == "vllm"
    return kind == "teacher" and teacher_engine(settings) == IN_PROCESS


def _vllm_on_gpus(settings: Settings) -> Literal["transformers", "vllm"]:
    on_gpus = device_of(settings.deployment) == "cuda"
    return "vllm" if on_gpus and vllm_importable() else "transformers"


def taken_arguments(settings: Settings) -> Iterator[tuple[str, str]]:
    """The arguments that `inference.extra_args` may not hold but does, and where each comes from.

    The second is the name of a setting, or empty where no setting says it.
    """
    yield from _taken(list(settings.inference.extra_args), TAKEN_ARGUMENTS)


def taken_flags(settings: Settings) -> Iterator[tuple[str, str]]:
    """The flags that `teacher_inference.extra_args` may not hold but does, as `taken_arguments`."""
    arguments = settings.teacher_inference.extra_args
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    yield from _taken(flags, TAKEN_FLAGS)


def _taken(given: Sequence[str], taken: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name in given:
        if name in taken:
            yield name, taken[name]


def vllm_environment(device: Literal["cpu", "cuda"]) -> dict[str, str]:
    """Environment variables for a process that runs vLLM; what the environment says goes first."""
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes a share of all memory
            # Two samplers would be compiled in the first request, for 20 s.
            "TORCHDYNAMO_DISABLE": "1",
            # It would pin every vLLM process of this machine to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return variables
