"""Rules that hold between settings. Each rule is a function of all settings, so none depends on an
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from onstream.settings.engine_rules import ENGINE_RULES, engine_warnings
from onstream.settings.fields import known
from onstream.settings.plan import Plan, make_plan
from onstream.settings.problem import Problem, stated
from onstream.settings.redis import TLS
from onstream.settings.root import Settings
from onstream.settings.route import (
    local_teacher,
    local_teacher_configured,
    route_of,
    teacher_configured,
    teacher_on,
    verification_on,
)
from onstream.settings.serving import taken_flags, teacher_engine
from onstream.settings.stages import WorkerKind

Rule = Callable[[Settings], Iterator[Problem]]


def problems_of(settings: Settings) -> list[Problem]:
    """Every combination of `settings` that cannot work."""
    return [problem for rule in _RULES for problem in rule(settings)]


def warnings_of(settings: Settings) -> list[str]:
    """What works, but may not be what was meant."""
    return [
        *_teacher_warnings(settings),
        *engine_warnings(settings),
        *_hard_distillation_warnings(settings),
        *_deployment_warnings(settings),
    ]


def _batches(settings: Settings) -> Iterator[Problem]:
    batch = settings.orchestrator.batch_size
    group = settings.orchestrator.group_size
    if batch % group:
        nearest = max(group, round(batch / group) * group)
        yield stated(
            settings,
            ["orchestrator.batch_size", "orchestrator.group_size"],
            "a batch of whole groups",
            f"Set orchestrator.batch_size = {nearest}.",
        )


def _training_signal(settings: Settings) -> Iterator[Problem]:
    loss = settings.trainer.loss
    verified = verification_on(settings)
    rewarded = loss.needs_reward and verified
    if loss.needs_reward and settings.orchestrator.verification.enabled is False:
        yield stated(
            settings,
            ["orchestrator.verification.enabled", loss.REWARD_SETTING],
            "rewards for the advantage to come from",
            f"{loss.WITHOUT_REWARD}, or enable verification.",
        )
    elif loss.teaches_own_rollouts and not loss.needs_teacher and not rewarded:
        stages = ["deployment.stages"] if settings.deployment.stages else []
        yield stated(
            settings,
            [*dict.fromkeys([loss.TEACHER_SETTING, loss.REWARD_SETTING]), *stages],
            "a teacher or rewards to learn from",
            f"{loss.LEARN_FROM}.",
        )
    elif rewarded and settings.orchestrator.group_size == 1:
        yield stated(
            settings,
            ["orchestrator.group_size", loss.REWARD_SETTING],
            "at least 2 rollouts a group, whose mean is the baseline of the advantage",
            f"Set orchestrator.group_size = 8. Or: {loss.WITHOUT_REWARD}.",
        )


def _teacher(settings: Settings) -> Iterator[Problem]:
    loss = settings.trainer.loss
    deployed = "score" in (settings.deployment.stages or ())
    left_out = settings.deployment.workers.of("teacher") == 0
    if loss.needs_teacher and not teacher_configured(settings) and not deployed:
        yield stated(
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


def _one_teacher(settings: Settings) -> Iterator[Problem]:
    external = settings.orchestrator.teacher_model
    if external is None or not external.model.name or not local_teacher_configured(settings):
        return
    if external.model.name != (settings.teacher_inference.model.name or settings.model.name):
        local = (
            "teacher_inference.model.name"
            if settings.teacher_inference.model.name
            else "model.name"
        )
        yield stated(
            settings,
            ["orchestrator.teacher_model.model.name", local, "deployment.num_teacher_gpus"],
            "one teacher, whether it is started here, runs elsewhere, or both",
            "Name the same model in both, or leave out orchestrator.teacher_model, or num_teacher_gpus and teacher_inference.",
        )


def _endpoints(settings: Settings) -> Iterator[Problem]:
    asking: dict[str, WorkerKind] = {
        "teacher_model": "teacher-external",
        "teacher_rollout_model": "generator",
    }
    for section, kind in asking.items():
        endpoint = getattr(settings.orchestrator, section)
        if endpoint is None:
            continue
        name = f"orchestrator.{section}"
        if not endpoint.model.name:
            yield stated(
                settings,
                [f"{name}.model.name"],
                "the model's name at the endpoint",
                f"Set {name}.model.name as its /models lists it.",
            )
        if not endpoint.client.base_url and _ask_endpoints(make_plan(settings), kind):
            yield stated(
                settings,
                [f"{name}.client.base_url"],
                f"the address of an endpoint for the {kind} worker to ask",
                f'Set {name}.client.base_url = ["http://host:8000/v1"].',
            )


def _ask_endpoints(plan: Plan, kind: WorkerKind) -> int:
    """Workers of `kind` that ask configured endpoints, and not the server that is started for the
    teacher.
    """
    return plan.workers.get(kind, 0) - (kind == "teacher-external" and plan.teacher_server > 0)


def _server_arguments(settings: Settings) -> Iterator[Problem]:
    for flag, setting in taken_flags(settings):
        yield stated(
            settings,
            ["teacher_inference.extra_args"],
            f"no {flag}, which {f'follows from {setting}' if setting else 'onstream up chooses'}",
            f"Leave {flag} out{f' and set {setting}' if setting else ''}.",
        )


def _sampling(settings: Settings) -> Iterator[Problem]:
    sampling = settings.inference.sampling
    loss = settings.trainer.loss
    if not loss.reads_generator:
        return
    if sampling.temperature != 1 and loss.needs_temperature_1:
        yield stated(
            settings,
            [
                "inference.sampling.temperature",
                "trainer.loss.teacher_tau",
                "trainer.loss.teacher_top_k",
            ],
            "temperature 1 with the sampled teacher term, since the teacher judges at temperature 1",
            "Set inference.sampling.temperature = 1.0, or trainer.loss.teacher_top_k = 4.",
        )


def _hard_distillation(settings: Settings) -> Iterator[Problem]:
    loss = settings.trainer.loss
    source = settings.orchestrator.teacher_rollout_model
    if source is None and not loss.teaches_own_rollouts:
        yield stated(
            settings,
            ["trainer.loss.type", "orchestrator.teacher_rollout_model.model.name"],
            "a teacher whose completions are trained on: the student's own teach it nothing",
            'Set orchestrator.teacher_rollout_model, or trainer.loss.type = "rl".',
        )
    if source is not None and (loss.reads_generator or loss.reads_teacher):
        yield stated(
            settings,
            ["orchestrator.teacher_rollout_model.model.name", "trainer.loss.type"],
            'the loss "sft", since what the teacher wrote has no importance ratios',
            'Set trainer.loss.type = "sft", or leave orchestrator.teacher_rollout_model out.',
        )
    if source is not None and source.keep == "verified" and not verification_on(settings):
        yield stated(
            settings,
            [
                "orchestrator.teacher_rollout_model.keep",
                "orchestrator.verification.enabled",
                "deployment.stages",
            ],
            "verification, to know which completions are right",
            'Set orchestrator.verification.enabled = true, or orchestrator.teacher_rollout_model.keep = "all".',
        )


def _token_client(settings: Settings) -> Iterator[Problem]:
    tokens = settings.orchestrator.use_token_client
    source = settings.orchestrator.teacher_rollout_model
    names = ["orchestrator.use_token_client", "orchestrator.teacher_rollout_model.model.name"]
    if tokens and source is not None:
        yield stated(
            settings,
            names,
            "chat messages with a teacher_rollout_model, whose token ids are not the student's",
            "Set orchestrator.use_token_client = false.",
        )
    if not tokens and source is None:
        yield stated(
            settings,
            names,
            "token ids, since the student itself writes the rollouts",
            "Leave orchestrator.use_token_client out, or set orchestrator.teacher_rollout_model.",
        )


def _unread_teacher(settings: Settings) -> Iterator[Problem]:
    loss = settings.trainer.loss
    teachers = [
        "deployment.num_teacher_gpus",
        "teacher_inference.model.name",
        "orchestrator.teacher_model.model.name",
    ]
    given = [name for name in teachers if known()[name].value(settings) is not None]
    if given and not loss.reads_teacher:
        yield stated(
            settings,
            ["trainer.loss.type", *given],
            f"no teacher that scores tokens: {loss.type} reads none of it",
            f"Leave {' and '.join(given)} out.",
        )


def _lora(settings: Settings) -> Iterator[Problem]:
    adapter = settings.trainer.lora
    loss = settings.trainer.loss
    if adapter is not None and adapter.dropout > 0 and loss.reads_generator:
        yield stated(
            settings,
            ["trainer.lora.dropout", "trainer.loss.type"],
            f"no dropout with {loss.type}: the ratios would compare a model with parts left out "
            "to the generator's whole one",
            "Leave trainer.lora.dropout out.",
        )


def _stages(settings: Settings) -> Iterator[Problem]:
    stages = settings.deployment.stages or ()
    if len(set(stages)) < len(stages):
        yield stated(
            settings,
            ["deployment.stages"],
            "each stage once",
            "deployment.workers says how many workers there are.",
        )


def _teacher_count(settings: Settings) -> Iterator[Problem]:
    deployment = settings.deployment
    count = deployment.workers.of("teacher")
    gpus = deployment.num_teacher_gpus
    if count and gpus and count != gpus and "teacher" not in deployment.started_elsewhere:
        yield stated(
            settings,
            ["deployment.workers.teacher", "deployment.num_teacher_gpus"],
            "one number of teachers",
            "Leave deployment.workers.teacher out: there is a teacher for each GPU.",
        )


def _redis_login(settings: Settings) -> Iterator[Problem]:
    redis = settings.redis
    url = urlsplit(redis.url.get_secret_value()) if redis.url is not None else urlsplit("")
    if redis.password is not None and (redis.url is None or url.password is not None):
        yield stated(
            settings,
            ["redis.password", "redis.url"],
            "one password, and an address to use it at",
            "Set redis.url without one.",
        )
    given = [f"redis.{name}" for name in TLS if getattr(redis, name) is not None]
    if given and url.scheme != "rediss":
        yield stated(
            settings,
            ["redis.url", *given],
            "rediss://, which is TLS",
            f"Set redis.url to that, or leave {given[0]} out.",
        )
    if (redis.tls_cert is None) != (redis.tls_key is None):
        yield stated(
            settings,
            ["redis.tls_cert", "redis.tls_key"],
            "a certificate and its key, or neither",
            "Set both.",
        )


def _task(settings: Settings) -> Iterator[Problem]:
    if settings.task.name == "jsonl" and settings.task.path is None:
        yield stated(
            settings, ["task.name", "task.path"], "the file of the jsonl task", "Set task.path."
        )
    for name in ("path", "eval_path"):
        if settings.task.name != "jsonl" and getattr(settings.task, name) is not None:
            yield stated(
                settings,
                ["task.name", f"task.{name}"],
                f"no task.{name}, which only a jsonl task reads",
                f"Leave task.{name} out.",
            )


def _evaluations(settings: Settings) -> Iterator[Problem]:
    if settings.eval.interval and not settings.eval.samples:
        yield stated(
            settings,
            ["eval.interval", "eval.samples"],
            "held-out prompts to evaluate on",
            "Set eval.samples = 256.",
        )


_RULES: tuple[Rule, ...] = (
    *(
        *ENGINE_RULES,
        _batches,
        _training_signal,
        _teacher,
        _one_teacher,
        _endpoints,
        _server_arguments,
        _sampling,
    ),
    *(
        _hard_distillation,
        _token_client,
        _unread_teacher,
        _lora,
        _stages,
        _teacher_count,
        _redis_login,
        _task,
        _evaluations,
    ),
)


def _teacher_warnings(settings: Settings) -> Iterator[str]:
    loss = settings.trainer.loss
    if teacher_on(settings) and not loss.needs_teacher:
        yield (
            f"The teacher is metric-only: {loss.TEACHER_SETTING} is 0, so its scores are reported "
            "as teacher_kl and train nothing."
        )
    own_teacher = local_teacher(settings) == settings.model.name
    if own_teacher and loss.needs_teacher and not loss.needs_reward:
        yield (
            f"The teacher is the student's own starting model ({settings.model.name}) and no "
            f"rewards are read ({loss.REWARD_SETTING}): nothing to learn."
        )
    if loss.teacher_top_k > 0 and not loss.needs_teacher:
        yield (
            f"trainer.loss.teacher_top_k = {loss.teacher_top_k} has no effect: the loss needs no "
            f"teacher ({loss.TEACHER_SETTING})."
        )
    if (
        settings.teacher_inference.extra_args
        and local_teacher(settings)
        and teacher_engine(settings) != "vllm"
    ):
        yield "teacher_inference.extra_args has no effect: the teacher's engine is transformers."
    if loss.needs_teacher and loss.needs_reward and not verification_on(settings):
        yield (
            f"{loss.REWARD_SETTING} has no effect: deployment.stages leaves the verifier out, so "
            "no rollout has a reward."
        )


def _hard_distillation_warnings(settings: Settings) -> Iterator[str]:
    if settings.orchestrator.teacher_rollout_model is None:
        return
    temperature = known()["inference.sampling.temperature"]
    if temperature.value(settings) != temperature.default:
        yield (
            f"{temperature.name} has no effect: the completions are those of "
            "orchestrator.teacher_rollout_model."
        )


def _deployment_warnings(settings: Settings) -> Iterator[str]:
    plan = make_plan(settings)
    for stage in plan.streams:
        kinds = plan.kinds(stage)
        elsewhere = settings.deployment.count_elsewhere
        if not any(plan.workers[kind] or elsewhere(kind) for kind in kinds):
            yield f"No {kinds[0]} worker is started here: the run waits until one joins (onstream worker {kinds[0]})."
    for stage, why in (
        ("verify", "orchestrator.verification.enabled = false"),
        ("score", f'trainer.loss.type = "{settings.trainer.loss.type}"'),
    ):
        if stage in (settings.deployment.stages or ()) and stage not in route_of(settings):
            yield f"deployment.stages names {stage}, but {why}: no {stage} worker runs."
    if plan.workers.get("jobs") == 0 and not settings.deployment.count_elsewhere("jobs"):
        yield "No jobs worker is started here: evaluations and verifications in jobs wait until one joins (onstream worker jobs)."
