"""Which worker gets which GPU, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onstream.settings.engines import student_engine
from onstream.settings.plan import Plan
from onstream.settings.problem import Problem
from onstream.settings.root import Settings
from onstream.settings.stages import COMPUTING, WorkerKind
from onstream.settings.text import shown

Place = tuple[WorkerKind, int]
"""A worker that this deployment starts: the index-th of its kind. Where a model is spread over
GPUs, each of its parts is one.
"""

SPLIT: dict[str, WorkerKind] = {"teacher": "teacher", "student": "generator"}
"""The models that vLLM may spread over GPUs, and who runs them."""


def gpu_problems(settings: Settings, plan: Plan, gpus: Sequence[str]) -> list[Problem]:
    """Why the workers that this deployment starts cannot have `gpus`, where it says how many it
    needs; empty where they can.
    """
    deployment = settings.deployment
    stated = (
        deployment.num_teacher_gpus is not None
        or plan.teacher_server
        or plan.student_servers
        or _parts(settings, plan, "generator") > 1
    )
    if plan.device != "cuda" or not stated:
        return []
    if settings.deployment.share_gpus and (unstated := _unstated(settings, plan)):
        return [_without_shares(unstated)]
    return [] if placement(settings, plan, gpus) is not None else [_too_few(settings, plan, gpus)]


def placement(settings: Settings, plan: Plan, gpus: Sequence[str]) -> dict[Place, str] | None:
    """A GPU for each worker that computes on one, largest share first; None where they do not fit,
    or compute on the CPU.

    The parts of one model, which `gpus_of` puts together again, have different GPUs.
    """
    if plan.device != "cuda":
        return None
    room = dict.fromkeys(gpus, 1.0)
    placed: dict[Place, str] = {}
    for place, share in sorted(_shares(settings, plan).items(), key=lambda item: -item[1]):
        barred = {
            placed[other]
            for other in placed
            if _whole(settings, plan, other) == _whole(settings, plan, place)
        }
        # Shares such as 0.1 and 0.7 do not add up exactly.
        gpu = next(
            (gpu for gpu, free in room.items() if free >= share - 1e-9 and gpu not in barred), None
        )
        if gpu is None:
            return None
        room[gpu] -= share
        placed[place] = gpu
    return placed


def gpus_of(settings: Settings, plan: Plan, placed: Mapping[Place, str], whole: Place) -> str:
    """The GPUs that hold the index-th model of a kind, as `CUDA_VISIBLE_DEVICES` names them;
    nothing where it has none.
    """
    return ",".join(
        gpu for place, gpu in sorted(placed.items()) if _whole(settings, plan, place) == whole
    )


def memory_share(settings: Settings, kind: WorkerKind) -> float | None:
    """The share of its GPU's memory that a worker of `kind` may take; None where it has the GPU for
    itself.
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


def _whole(settings: Settings, plan: Plan, part: Place) -> Place:
    """The model that `part` belongs to: the how-manieth of its kind."""
    kind, index = part
    return kind, index // _parts(settings, plan, kind)


def _computing(settings: Settings, plan: Plan) -> dict[WorkerKind, int]:
    """Parts of models that are computed on a GPU here. A server counts as the worker that asks it,
    which computes nothing itself.
    """
    counts: dict[WorkerKind, int] = plan.workers | ({"teacher": 1} if plan.teacher_server else {})
    if plan.rollout_teacher is not None:
        counts["generator"] = 0
    elif student_engine(settings) == "server":
        counts["generator"] = plan.student_servers
    return {
        kind: counts[kind] * _parts(settings, plan, kind) for kind in COMPUTING if counts.get(kind)
    }


def _shares(settings: Settings, plan: Plan) -> dict[Place, float]:
    counts = _computing(settings, plan)
    return {
        (kind, index): memory_share(settings, kind) or 1.0
        for kind, count in counts.items()
        for index in range(count)
    }


def _unstated(settings: Settings, plan: Plan) -> list[str]:
    kinds = _computing(settings, plan)
    return [
        f"deployment.gpu_memory_shares.{COMPUTING[kind]}"
        for kind in kinds
        if memory_share(settings, kind) is None
    ]


def _without_shares(names: Sequence[str]) -> Problem:
    return Problem(
        tuple(names),
        f"deployment.share_gpus = true without {', '.join(names)}",
        "the share of a GPU's memory for each kind of worker that runs here",
        f"Set {names[0]} = 0.3, for example.",
    )


def _too_few(settings: Settings, plan: Plan, gpus: Sequence[str]) -> Problem:
    counts = _computing(settings, plan)
    shares = _shares(settings, plan)
    parts = [
        f"{COMPUTING[kind]} {count}{_of_share(settings, kind)}" for kind, count in counts.items()
    ]
    advice = "Lower deployment.num_teacher_gpus" + (
        " or the shares."
        if settings.deployment.share_gpus
        else ', or set deployment.share_gpus = true with deployment.gpu_memory_shares, or deployment.device = "cpu".'
    )
    stated = shown(settings.deployment.num_teacher_gpus)
    served = plan.teacher_server
    split = [
        f"each part of the {what}"
        for what, kind in SPLIT.items()
        if counts.get(kind) and _parts(settings, plan, kind) > 1
    ]
    return Problem(
        ("deployment.num_teacher_gpus", "deployment.share_gpus"),
        f"{' + '.join(parts)} = {sum(shares.values()):g} GPUs (deployment.num_teacher_gpus = {stated})",
        f"workers that fit the {len(gpus)} found here{', ' + ' and '.join(split) + ' on another one' if split else ''}",
        advice
        + (' teacher_inference.engine = "transformers" starts no vLLM server.' if served else ""),
    )


def _of_share(settings: Settings, kind: WorkerKind) -> str:
    share = memory_share(settings, kind)
    return "" if share is None else f" × {share:g}"
