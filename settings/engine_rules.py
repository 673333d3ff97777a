"""Rules between the settings of the student's engine and the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from onstream.settings.devices import device_of
from onstream.settings.engines import student_engine, taken_arguments
from onstream.settings.fields import known
from onstream.settings.plan import make_plan
from onstream.settings.problem import Problem, stated
from onstream.settings.root import Settings

VLLM_ONLY = tuple(
    f"inference.{name}"
    for name in (
        "tensor_parallel_size",
        "data_parallel_size",
        "gpu_memory_utilization",
        "max_model_len",
        "enforce_eager",
        "extra_args",
    )
)
"""Settings that only vLLM reads."""

SERVER_ONLY = ("deployment.num_infer_gpus",)
CLIENT = "inference.client."
"""Settings that only the engine `server` reads."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")

VLLM_COLDEST = 0.01

STATED_FOR_NCCL = (
    'Set weights.transport = "filesystem" or "redis"; for "nccl" state deployment.device = "cuda" and inference.engine = "vllm", since '
    "auto differs between machines."
)


def _engine_arguments(settings: Settings) -> Iterator[Problem]:
    for name, setting in taken_arguments(settings):
        yield stated(
            settings,
            ["inference.extra_args"],
            f"no {name}, which {f'follows from {setting}' if setting else 'the engine chooses'}",
            f"Leave {name} out{f' and set {setting}' if setting else ''}.",
        )


def _model_len(settings: Settings) -> Iterator[Problem]:
    longest = settings.inference.max_model_len
    if longest is not None and longest <= settings.inference.sampling.max_completion:
        yield stated(
            settings,
            ["inference.max_model_len", "inference.sampling.max_completion"],
            "room for a prompt beside the longest completion",
            "Raise inference.max_model_len, or lower inference.sampling.max_completion.",
        )


def _student_servers(settings: Settings) -> Iterator[Problem]:
    if student_engine(settings) != "server":
        return
    deployment = settings.deployment
    inference = settings.inference
    plan = make_plan(settings)
    count = "deployment.workers.generator"
    if max(plan.workers["generator"], deployment.count_elsewhere("generator")) > 1:
        yield stated(
            settings,
            [count, "inference.engine"],
            "one generator, which has all the servers write and replaces their weights",
            f"Set {count} = 1; more servers write more.",
        )
    each = inference.tensor_parallel_size * inference.data_parallel_size
    if (
        plan.student_servers
        and plan.device == "cuda"
        and (deployment.num_infer_gpus or each) % each
    ):
        yield stated(
            settings,
            [
                "deployment.num_infer_gpus",
                "inference.tensor_parallel_size",
                "inference.data_parallel_size",
            ],
            f"a multiple of the {each} GPUs that one server takes",
            f"Set deployment.num_infer_gpus = {each}.",
        )


def _cold(settings: Settings) -> Iterator[Problem]:
    if (
        student_engine(settings) != "transformers"
        and settings.inference.sampling.temperature < VLLM_COLDEST
    ):
        yield stated(
            settings,
            ["inference.sampling.temperature"],
            f"at least {VLLM_COLDEST} with vLLM, which takes that for anything lower",
            'Raise it, or set inference.engine = "transformers".',
        )


def _from_gpu_to_gpu(settings: Settings) -> Iterator[Problem]:
    if settings.weights.transport != "nccl":
        return
    device = device_of(settings.deployment)
    deployment = settings.deployment
    needed = [
        ("deployment.device", device == "cuda", "CUDA, since weights go from GPU to GPU"),
        (
            "inference.engine",
            student_engine(settings) == "vllm",
            "vLLM inside the generators, whose engine receives the weights",
        ),
        (
            "inference.on_new_weights",
            settings.inference.on_new_weights != "wait",
            "weights that are taken at once",
        ),
        (
            "deployment.share_gpus",
            not deployment.share_gpus,
            "a GPU of its own for each process, which NCCL asks for",
        ),
        ("weights.delta", not settings.weights.deltas, "whole sets of weights"),
    ]
    for name, holds, expected in needed:
        if not holds:
            yield stated(settings, ["weights.transport", name], expected, STATED_FOR_NCCL)


ENGINE_RULES: tuple[Callable[[Settings], Iterator[Problem]], ...] = (
    *(_engine_arguments, _model_len, _student_servers, _cold, _from_gpu_to_gpu),
)


def engine_warnings(settings: Settings) -> Iterator[str]:
    """What works, but may not be what was meant of the engine."""
    engine = student_engine(settings)
    client = settings.inference.client
    idle = (
        [name for name in known() if name in SERVER_ONLY or name.startswith(CLIENT)]
        if engine != "server"
        else []
    )
    for name in [*(VLLM_ONLY if engine == "transformers" else ()), *idle]:
        setting = known()[name]
        if setting.value(settings) != setting.default:
            yield f"{name} has no effect: the student's engine is {engine}."
    if engine == "server" and client.base_url and settings.deployment.num_infer_gpus is not None:
        yield "deployment.num_infer_gpus has no effect: the student's servers are those of inference.client.base_url."
    elsewhere = [url for url in client.base_url if urlsplit(url).hostname not in LOOPBACK]
    if engine == "server" and elsewhere and client.weights_dir is None:
        yield (
            f"{elsewhere[0]} must read this machine's temporary files to get new weights: where it is another machine, set "
            "inference.client.weights_dir to a directory that both share."
        )
