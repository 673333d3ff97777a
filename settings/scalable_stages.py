"""The stages that `deployment.balance = "auto"` may give more workers."""

from __future__ import annotations

from onstream.settings.engines import student_engine, teacher_engine
from onstream.settings.plan import Plan
from onstream.settings.root import Settings
from onstream.settings.sections.client import EndpointSettings
from onstream.settings.stages import COMPUTING, FIRST, JOBS, StageName, WorkerKind


def scalable_stages(settings: Settings, plan: Plan) -> dict[StageName, WorkerKind]:
    """The stages that may have more workers here, and the kind that each gets one of.

    None without `balance = "auto"`, nor where the trainer is elsewhere: what it waits for is known
    beside it alone. A stage of which others start any kind is theirs. Teachers by name stay as many
    as they are.
    """
    if settings.deployment.balance != "auto" or not plan.workers.get("trainer"):
        return {}
    elsewhere = set(settings.deployment.started_elsewhere)
    found: dict[StageName, WorkerKind] = {}
    for stage in (FIRST, *plan.route):
        kinds = plan.kinds(stage)
        here = [kind for kind in kinds if plan.workers[kind] and _is_scalable(kind, settings, plan)]
        if here and not elsewhere & set(kinds):
            found[stage] = here[0]
    return found


def computes_here(kind: WorkerKind, plan: Plan) -> bool:
    """Whether a worker of `kind` computes models, and so needs a core of its own."""
    asks_endpoints = kind == "generator" and plan.rollout_teacher is not None
    return kind in (*COMPUTING, JOBS.kind) and not asks_endpoints


def workers_with_room(settings: Settings, plan: Plan) -> dict[WorkerKind, int]:
    """The workers that cores are shared out among.

    Those of the plan, and one more of each kind that computes and may be added.
    """
    workers = dict(plan.workers)
    for teacher in plan.named_teachers.values():
        workers[teacher.kind] = workers.get(teacher.kind, 0) + teacher.workers
    for kind in scalable_stages(settings, plan).values():
        workers[kind] += computes_here(kind, plan)
    return workers


def _is_scalable(kind: WorkerKind, settings: Settings, plan: Plan) -> bool:
    """Whether one more worker of `kind` has a place, and breaks no bound that was set."""
    orchestrator = settings.orchestrator
    if kind == "verifier":
        judge = orchestrator.judge_model
        in_jobs = orchestrator.verification.in_jobs == "always"
        return not in_jobs and (judge is None or _is_unmetered(judge.client))
    if kind == "teacher-external":
        # Those that ask the server of this launch are as many as it takes.
        asked = orchestrator.teacher_model
        return not plan.teacher_server and asked is not None and _is_unmetered(asked.client)
    if kind == "generator" and orchestrator.teacher_rollout_model is not None:
        return _is_unmetered(orchestrator.teacher_rollout_model.client)
    if kind == "generator":
        return plan.device == "cpu" and student_engine(settings) == "transformers"
    if kind == "teacher":
        return plan.device == "cpu" and teacher_engine(settings) == "transformers"
    return False


def _is_unmetered(client: EndpointSettings) -> bool:
    """Whether no budget of each worker would be spent twice."""
    return client.requests_per_second is None
