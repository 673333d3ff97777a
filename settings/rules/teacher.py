"""Rules between the settings of the teacher: one, somewhere, and reachable."""

from __future__ import annotations

from collections.abc import Iterator

from onstream.settings.engines import taken_flags, teacher_engine
from onstream.settings.fields import known
from onstream.settings.plan import Plan, make_plan
from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.prompt_template import template_fields
from onstream.settings.root import Settings
from onstream.settings.route import (
    local_teacher,
    local_teacher_configured,
    rewards_on,
    rollout_teacher,
    taught_by_own_start,
    teacher_configured,
    teacher_on,
)
from onstream.settings.stages import WorkerKind


def needed_teacher(settings: Settings) -> Iterator[SettingsProblem]:
    """A teacher that the loss needs is there."""
    loss = settings.trainer.loss
    deployed = "score" in (settings.deployment.stages or ())
    left_out = settings.deployment.workers.of("teacher") == 0
    if loss.needs_teacher and not teacher_configured(settings) and not deployed:
        yield problem_with(
            settings,
            [
                loss.TEACHER_SETTING,
                *(["deployment.workers.teacher"] if left_out else []),
                "deployment.num_teacher_gpus",
                "teacher_inference.model.name",
                "orchestrator.teacher_model.model.name",
            ],
            "a teacher",
            _teacher_advice(left_out, loss.WITHOUT_TEACHER),
        )


def _teacher_advice(left_out: bool, without: str) -> str:
    if left_out:
        return (
            "Set deployment.workers.teacher = 1, or orchestrator.teacher_model for one elsewhere. "
            f"Or: {without}."
        )
    return (
        "Set deployment.num_teacher_gpus = 1 to start one, and teacher_inference.model.name unless "
        "it is the student's starting model; or orchestrator.teacher_model for one elsewhere."
    )


def one_teacher(settings: Settings) -> Iterator[SettingsProblem]:
    """A local and an external teacher are the same model."""
    external = settings.orchestrator.teacher_model
    if external is None or not external.model.name or not local_teacher_configured(settings):
        return
    if external.model.name != (settings.teacher_inference.model.name or settings.model.name):
        own_model = settings.teacher_inference.model.name is not None
        local = "teacher_inference.model.name" if own_model else "model.name"
        yield problem_with(
            settings,
            ["orchestrator.teacher_model.model.name", local, "deployment.num_teacher_gpus"],
            "one teacher, whether it is started here, runs elsewhere, or both",
            "Name the same model in both, or leave out orchestrator.teacher_model, or "
            "num_teacher_gpus and teacher_inference.",
        )


def endpoints(settings: Settings) -> Iterator[SettingsProblem]:
    """Endpoints that are asked have an address, and their model a name."""
    asking: dict[str, WorkerKind] = {
        "teacher_model": "teacher-external",
        "teacher_rollout_model": "generator",
        "judge_model": "verifier",
    }
    for section, kind in asking.items():
        endpoint = getattr(settings.orchestrator, section)
        if endpoint is None:
            continue
        name = f"orchestrator.{section}"
        if not endpoint.model.name:
            yield problem_with(
                settings,
                [f"{name}.model.name"],
                "the model's name at the endpoint",
                f"Set {name}.model.name as its /models lists it.",
            )
        if not endpoint.client.base_url and _ask_endpoints(make_plan(settings), kind):
            yield problem_with(
                settings,
                [f"{name}.client.base_url"],
                f"the address of an endpoint for the {kind} worker to ask",
                f'Set {name}.client.base_url = ["http://host:8000/v1"].',
            )


def _ask_endpoints(plan: Plan, kind: WorkerKind) -> int:
    """Workers of `kind` that ask configured endpoints, not a server that is started here."""
    return plan.workers.get(kind, 0) - (kind == "teacher-external" and plan.teacher_server > 0)


def server_flags(settings: Settings) -> Iterator[SettingsProblem]:
    """`teacher_inference.extra_args` holds nothing that a setting says."""
    for flag, setting in taken_flags(settings):
        owner = f"follows from {setting}" if setting else "onstream up chooses"
        instead = f" and set {setting}" if setting else ""
        yield problem_with(
            settings,
            ["teacher_inference.extra_args"],
            f"no {flag}, which {owner}",
            f"Leave {flag} out{instead}.",
        )


def unread_teacher(settings: Settings) -> Iterator[SettingsProblem]:
    """No teacher scores where the loss reads none."""
    loss = settings.trainer.loss
    teachers = [
        "deployment.num_teacher_gpus",
        "teacher_inference.model.name",
        "orchestrator.teacher_model.model.name",
    ]
    given = [name for name in teachers if known()[name].value(settings) is not None]
    if given and not loss.reads_teacher:
        yield problem_with(
            settings,
            ["trainer.loss.type", *given],
            f"no teacher that scores tokens: {loss.type} reads none of it",
            f"Leave {' and '.join(given)} out.",
        )


def teacher_prompt(settings: Settings) -> Iterator[SettingsProblem]:
    """Some teacher reads the prompt that is the teacher's alone, and it shows no images."""
    given = settings.task.teacher_prompt.given
    if not given:
        return
    if not teacher_on(settings) and rollout_teacher(settings) is None:
        yield problem_with(
            settings,
            given,
            "a teacher that reads it: one that scores, or one whose completions are trained on",
            "Set trainer.loss.teacher_tau and name a teacher, or leave task.teacher_prompt out.",
        )
    if settings.task.name == "colour-words":
        yield problem_with(
            settings,
            ["task.name", *given],
            "a task without images: the teacher's own prompt is text alone",
            "Leave task.teacher_prompt out.",
        )


def teacher_count(settings: Settings) -> Iterator[SettingsProblem]:
    """There is one number of teachers."""
    deployment = settings.deployment
    count = deployment.workers.of("teacher")
    gpus = deployment.num_teacher_gpus
    if count and gpus and count != gpus and "teacher" not in deployment.started_elsewhere:
        yield problem_with(
            settings,
            ["deployment.workers.teacher", "deployment.num_teacher_gpus"],
            "one number of teachers",
            "Leave deployment.workers.teacher out: there is a teacher for each GPU.",
        )


def teacher_warnings(settings: Settings) -> Iterator[str]:
    """What works, but may not be what was meant of the teacher."""
    loss = settings.trainer.loss
    if teacher_on(settings) and not loss.needs_teacher:
        yield (
            f"The teacher is metric-only: {loss.TEACHER_SETTING} is 0, so its scores are reported "
            "as teacher_kl and train nothing."
        )
    if taught_by_own_start(settings) and loss.needs_teacher and not loss.needs_reward:
        yield (
            f"The teacher is the student's own starting model ({settings.model.name}) and no "
            f"rewards are read ({loss.REWARD_SETTING}): nothing to learn."
        )
    template = settings.task.teacher_prompt.template
    if template is not None and "prompt" not in template_fields(template):
        yield (
            "task.teacher_prompt.template has no {prompt}: the teacher does not read what the "
            "student is asked."
        )
    if loss.most_top_k > 0 and not loss.needs_teacher:
        yield (
            f"trainer.loss.teacher_top_k = {loss.teacher_top_k} has no effect: the loss needs no "
            f"teacher ({loss.TEACHER_SETTING})."
        )
    without_vllm = local_teacher(settings) and teacher_engine(settings) == "transformers"
    if settings.teacher_inference.extra_args and without_vllm:
        yield "teacher_inference.extra_args has no effect: the teacher's engine is transformers."
    if loss.needs_teacher and loss.needs_reward and not rewards_on(settings):
        yield (
            f"{loss.REWARD_SETTING} has no effect: deployment.stages leaves the verifier out, so "
            "no rollout has a reward."
        )


TEACHER_RULES = (
    needed_teacher,
    one_teacher,
    endpoints,
    server_flags,
    unread_teacher,
    teacher_count,
    teacher_prompt,
)
