"""Which worker gets which GPU, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence

from settings.deployment import WorkerKind
from settings.plan import Plan
from settings.problem import Problem
from settings.root import Settings
from settings.text import shown

Place = tuple[WorkerKind, int]
"""A worker that this deployment starts: the index-th of its kind."""

ROLES: dict[WorkerKind, str] = {"trainer": "train", "generator": "inference", "teacher": "teacher"}
"""The workers that compute on a GPU, by the names of their shares in `deployment.gpu_memory_shares`."""


def gpu_problems(settings: Settings, plan: Plan, gpus: Sequence[str]) -> list[Problem]:
    """Why the workers that this deployment starts beside a teacher of its own cannot have `gpus`; empty where they can."""
    if plan.device != "cuda" or (settings.deployment.num_teacher_gpus is None and not plan.teacher_server):
        return []
    if settings.deployment.share_gpus and (unstated := _unstated(settings, plan)):
        return [_without_shares(unstated)]
    return [] if placement(settings, plan, gpus) is not None else [_too_few(settings, plan, gpus)]


def placement(settings: Settings, plan: Plan, gpus: Sequence[str]) -> dict[Place, str] | None:
    """A GPU for each worker that computes on one, largest share first; None where they do not fit, or compute on the CPU.

    Where a server spreads the teacher over GPUs, each part of it is a `teacher` here and has another GPU.
    """
    if plan.device != "cuda":
        return None
    room = dict.fromkeys(gpus, 1.0)
    placed: dict[Place, str] = {}
    for place, share in sorted(_shares(settings, plan).items(), key=lambda item: -item[1]):
        # Shares such as 0.1 and 0.7 do not add up exactly.
        barred = {placed[other] for other in placed if plan.teacher_server and place[0] == other[0] == "teacher"}
        gpu = next((gpu for gpu, free in room.items() if free >= share - 1e-9 and gpu not in barred), None)
        if gpu is None:
            return None
        room[gpu] -= share
        placed[place] = gpu
    return placed


def memory_share(settings: Settings, kind: WorkerKind) -> float | None:
    """The share of its GPU's memory that a worker of `kind` may take; None where it has the GPU for itself."""
    if not settings.deployment.share_gpus or kind not in ROLES:
        return None
    share: float | None = getattr(settings.deployment.gpu_memory_shares, ROLES[kind])
    return share


def _computing(settings: Settings, plan: Plan) -> dict[WorkerKind, int]:
    """Workers started here that compute on a GPU; in hard distillation the generators only ask an endpoint."""
    kinds = [kind for kind in ROLES if kind != "generator" or plan.rollout_teacher is None]
    counts: dict[WorkerKind, int] = plan.workers | ({"teacher": plan.teacher_server} if plan.teacher_server else {})
    return {kind: counts[kind] for kind in kinds if counts.get(kind)}


def _shares(settings: Settings, plan: Plan) -> dict[Place, float]:
    counts = _computing(settings, plan)
    return {(kind, index): memory_share(settings, kind) or 1.0 for kind, count in counts.items() for index in range(count)}


def _unstated(settings: Settings, plan: Plan) -> list[str]:
    kinds = _computing(settings, plan)
    return [f"deployment.gpu_memory_shares.{ROLES[kind]}" for kind in kinds if memory_share(settings, kind) is None]


def _without_shares(names: Sequence[str]) -> Problem:
    return Problem(
        tuple(names),
        f"deployment.share_gpus = true without {', '.join(names)}",
        "the share of a GPU's memory for each kind of worker that runs here",
        f"Set {names[0]} = 0.3, for example.",
    )


def _too_few(settings: Settings, plan: Plan, gpus: Sequence[str]) -> Problem:
    counts, shares = _computing(settings, plan), _shares(settings, plan)
    parts = [f"{ROLES[kind]} {count}{_of_share(settings, kind)}" for kind, count in counts.items()]
    advice = "Lower deployment.num_teacher_gpus" + (
        " or the shares."
        if settings.deployment.share_gpus
        else ', or set deployment.share_gpus = true with deployment.gpu_memory_shares, or deployment.device = "cpu".'
    )
    stated, served = shown(settings.deployment.num_teacher_gpus), plan.teacher_server
    return Problem(
        ("deployment.num_teacher_gpus", "deployment.share_gpus"),
        f"{' + '.join(parts)} = {sum(shares.values()):g} GPUs (deployment.num_teacher_gpus = {stated})",
        f"workers that fit the {len(gpus)} found here{', each part of the teacher on another one' if served > 1 else ''}",
        advice + (' teacher_inference.engine = "transformers" starts no vLLM server.' if served else ""),
    )


def _of_share(settings: Settings, kind: WorkerKind) -> str:
    share = memory_share(settings, kind)
    return "" if share is None else f" × {share:g}"
