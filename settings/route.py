"""Which stages rollouts pass: whether they are verified, and which teachers score or write."""

from __future__ import annotations

from onstream.settings.root import Settings
from onstream.settings.stages import DEFAULT_TEACHER, STAGE_NAMES, StageName


def route_of(settings: Settings) -> tuple[StageName, ...]:
    """The stages of a rollout after it was generated."""
    route: list[StageName] = []
    if settings.task.environment is not None:
        route.append("act")
    if verification_on(settings):
        route.append("verify")
    if teacher_on(settings):
        route.append("score")
    return (*route, STAGE_NAMES[-1])


def verification_on(settings: Settings) -> bool:
    """Whether rollouts are verified.

    As `orchestrator.verification.enabled` says, else where there is a verifier; not where an
    environment gives the rewards.
    """
    if settings.task.environment is not None:
        return False
    enabled = settings.orchestrator.verification.enabled
    deployment = settings.deployment
    if enabled is not None:
        return enabled
    if deployment.stages is not None:
        return "verify" in deployment.stages
    return deployment.workers.of("verifier") != 0


def rewards_on(settings: Settings) -> bool:
    """Whether rollouts get rewards: from a verifier or from their environment."""
    return verification_on(settings) or settings.task.environment is not None


def teacher_on(settings: Settings) -> bool:
    """Whether a teacher scores.

    Always where the loss needs it; never where the loss reads none of it; else where one is
    deployed or configured, for the metrics alone.
    """
    loss = settings.trainer.loss
    if not loss.reads_teacher:
        return False
    if loss.needs_teacher:
        return True
    stages = settings.deployment.stages
    if stages is not None:
        return "score" in stages
    return teacher_configured(settings)


def teacher_configured(settings: Settings) -> bool:
    """Whether the settings say where a teacher's scores come from."""
    return bool(settings.teachers) or default_teacher_configured(settings)


def default_teacher_configured(settings: Settings) -> bool:
    """Whether they say it of the teacher without a table in `[teachers]`."""
    return local_teacher_configured(settings) or settings.orchestrator.teacher_model is not None


def teachers_of(settings: Settings) -> tuple[str, ...]:
    """The names of the teachers that score, where there are any by name; `default` comes first."""
    if not settings.teachers or not teacher_on(settings):
        return ()
    default = [DEFAULT_TEACHER] if default_teacher_configured(settings) else []
    return (*default, *settings.teachers)


def local_teacher_configured(settings: Settings) -> bool:
    """Whether the settings ask for a teacher beside the run, and none of them leaves it out."""
    if settings.deployment.workers.of("teacher") == 0:
        return False
    return (
        settings.deployment.num_teacher_gpus is not None
        or settings.teacher_inference.model.name is not None
    )


def local_teacher(settings: Settings) -> str | None:
    """The model of the teacher beside the run: its own, or the student's starting model.

    None where none scores.
    """
    external = settings.orchestrator.teacher_model is not None
    instead = external or bool(settings.teachers)
    others_alone = instead and not local_teacher_configured(settings)
    left_out = settings.deployment.workers.of("teacher") == 0
    if others_alone or left_out or not teacher_on(settings):
        return None
    return settings.teacher_inference.model.name or settings.model.name


def taught_by_own_start(settings: Settings) -> bool:
    """Whether the teacher is the student's own start, and reads what the student reads."""
    own = local_teacher(settings) == settings.model.name
    return own and not settings.task.teacher_prompt.differs


def external_teacher(settings: Settings) -> str | None:
    """The name by which external endpoints know the teacher; None where they are not asked."""
    external = settings.orchestrator.teacher_model
    return external.model.name if external is not None and teacher_on(settings) else None


def rollout_teacher(settings: Settings) -> str | None:
    """Hard distillation: the name of the model whose completions are trained on.

    None where the student writes them.
    """
    source = settings.orchestrator.teacher_rollout_model
    return source.model.name if source is not None else None
