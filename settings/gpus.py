"""Which worker gets which GPU, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onstream.settings.devices import has_uncounted_gpu
from onstream.settings.engines import student_engine
from onstream.settings.plan import Plan
from onstream.settings.problems import SettingsProblem
from onstream.settings.root import Settings
from onstream.settings.stages import COMPUTING, WorkerKind
from onstream.settings.toml import shown

Place = tuple[WorkerKind, int]
"""The index-th worker of a kind that this deployment starts. Where a model is spread over GPUs,
each of its parts is one."""

SPREAD: dict[str, WorkerKind] = {"teacher": "teacher", "student": "generator"}
"""The models that vLLM may spread over GPUs, and the kind that runs each."""

ROUNDING = 1e-9
"""Shares such as 0.1 and 0.7 do not add up exactly."""


def gpu_problems(settings: Settings, plan: Plan, gpus: Sequence[str]) -> list[SettingsProblem]:
    """Why the workers that this deployment starts cannot have `gpus`; empty where they can.

    Nothing is wrong where no setting says how many GPUs are needed: then they share what there is.
    """
    deployment = settings.deployment
    no_gpu = plan.device == "cuda" and not gpus and not has_uncounted_gpu()
    if no_gpu and _computing(settings, plan):
        return [_NO_GPU]
    says_how_many = (
        deployment.num_teacher_gpus is not None
        or plan.teacher_server
        or plan.student_servers
        or _parts(settings, plan, "generator") > 1
    )
    if plan.device != "cuda" or not says_how_many:
        return []
    if deployment.share_gpus and (missing := _missing_shares(settings, plan)):
        return [_without_shares(missing)]
    if placement(settings, plan, gpus) is None:
        return [_too_few(settings, plan, gpus)]
    return []


_NO_GPU = SettingsProblem(
    ("deployment.device",),
    'deployment.device = "cuda", and no GPU is found here',
    "a GPU of NVIDIA: a file /dev/nvidia0, and no empty CUDA_VISIBLE_DEVICES",
    'Set deployment.device = "cpu", or look at nvidia-smi and CUDA_VISIBLE_DEVICES.',
)


def placement(settings: Settings, plan: Plan, gpus: Sequence[str]) -> dict[Place, str] | None:
    """A GPU for each worker that computes on one, largest share first.

    The parts of one model get different GPUs; `gpus_of` puts them together again. None where they
    do not fit, or compute on the CPU.
    """
    if plan.device != "cuda":
        return None
    room = dict.fromkeys(gpus, 1.0)
    placed: dict[Place, str] = {}
    for place, share in sorted(_shares(settings, plan).items(), key=lambda item: -item[1]):
        taken = gpus_of(settings, plan, placed, _model(settings, plan, place)).split(",")
        fitting = [gpu for gpu in room if room[gpu] >= share - ROUNDING and gpu not in taken]
        if not fitting:
            return None
        room[fitting[0]] -= share
        placed[place] = fitting[0]
    return placed


def gpus_of(settings: Settings, plan: Plan, placed: Mapping[Place, str], model: Place) -> str:
    """The GPUs that hold `model`, the index-th of its kind, as `CUDA_VISIBLE_DEVICES` names them.

    Empty where it has none.
    """
    parts = [place for place in sorted(placed) if _model(settings, plan, place) == model]
    return ",".join(placed[part] for part in parts)


def memory_share(settings: Settings, kind: WorkerKind) -> float | None:
    """The share of its GPU's memory that a worker of `kind` may take.

    None where it has the GPU for itself.
    """
    if not settings.deployment.share_gpus or kind not in COMPUTING:
        return None
    return settings.deployment.gpu_memory_shares.of(kind)


def _parts(settings: Settings, plan: Plan, kind: WorkerKind) -> int:
    """GPUs that one model of `kind` is spread over."""
    if kind == "teacher" and plan.teacher_server:
        return plan.teacher_server
    if kind == "generator" and (student_engine(settings) == "vllm" or plan.student_servers):
        return settings.inference.tensor_parallel_size * settings.inference.data_parallel_size
    return 1


def _model(settings: Settings, plan: Plan, part: Place) -> Place:
    """The model that `part` belongs to: its kind, and which one of it."""
    kind, index = part
    return kind, index // _parts(settings, plan, kind)


def _computing(settings: Settings, plan: Plan) -> dict[WorkerKind, int]:
    """Parts of models that are computed on a GPU here, by kind.

    A server counts as the worker that asks it, which computes nothing itself.
    """
    models = dict(plan.workers)
    if plan.teacher_server:
        models["teacher"] = 1
    if plan.rollout_teacher is not None:
        models["generator"] = 0
    elif student_engine(settings) == "server":
        models["generator"] = plan.student_servers
    kinds = [kind for kind in COMPUTING if models.get(kind)]
    return {kind: models[kind] * _parts(settings, plan, kind) for kind in kinds}


def _shares(settings: Settings, plan: Plan) -> dict[Place, float]:
    """The share of a GPU that each part of a model takes."""
    shares: dict[Place, float] = {}
    for kind, count in _computing(settings, plan).items():
        share = memory_share(settings, kind) or 1.0
        shares |= {(kind, index): share for index in range(count)}
    return shares


def _missing_shares(settings: Settings, plan: Plan) -> list[str]:
    """The settings of shares that are needed and not set."""
    computing = _computing(settings, plan)
    kinds = [kind for kind in computing if memory_share(settings, kind) is None]
    return [f"deployment.gpu_memory_shares.{COMPUTING[kind]}" for kind in kinds]


def _without_shares(names: Sequence[str]) -> SettingsProblem:
    return SettingsProblem(
        tuple(names),
        f"deployment.share_gpus = true without {', '.join(names)}",
        "the share of a GPU's memory for each kind of worker that runs here",
        f"Set {names[0]} = 0.3, for example.",
    )


def _too_few(settings: Settings, plan: Plan, gpus: Sequence[str]) -> SettingsProblem:
    computing = _computing(settings, plan)
    needed = " + ".join(
        f"{COMPUTING[kind]} {count}{_of_share(settings, kind)}" for kind, count in computing.items()
    )
    total = sum(_shares(settings, plan).values())
    stated = shown(settings.deployment.num_teacher_gpus)
    return SettingsProblem(
        ("deployment.num_teacher_gpus", "deployment.share_gpus"),
        f"{needed} = {total:g} GPUs (deployment.num_teacher_gpus = {stated})",
        f"workers that fit the {len(gpus)} found here{_spread_models(settings, plan)}",
        _advice(settings, plan),
    )


def _spread_models(settings: Settings, plan: Plan) -> str:
    """What is expected of models that are spread over GPUs, for the end of a line."""
    computing = _computing(settings, plan)
    spread = [
        f"each part of the {model}"
        for model, kind in SPREAD.items()
        if kind in computing and _parts(settings, plan, kind) > 1
    ]
    return f", {' and '.join(spread)} on another one" if spread else ""


def _advice(settings: Settings, plan: Plan) -> str:
    if settings.deployment.share_gpus:
        advice = "Lower deployment.num_teacher_gpus or the shares."
    else:
        advice = (
            "Lower deployment.num_teacher_gpus, or set deployment.share_gpus = true with "
            'deployment.gpu_memory_shares, or deployment.device = "cpu".'
        )
    if plan.teacher_server:
        advice += ' teacher_inference.engine = "transformers" starts no vLLM server.'
    return advice


def _of_share(settings: Settings, kind: WorkerKind) -> str:
    share = memory_share(settings, kind)
    return "" if share is None else f" × {share:g}"
