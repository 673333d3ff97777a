"""Rules between the settings of a deployment: its stages, its workers and its Redis."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from onstream.settings.plan import make_plan
from onstream.settings.problems import SettingsProblem, problem_with
from onstream.settings.redis import TLS
from onstream.settings.root import Settings
from onstream.settings.route import route_of
from onstream.settings.rules.engines import LOOPBACK
from onstream.settings.scalable_stages import scalable_stages
from onstream.settings.stages import stage_of, teacher_of


def stages_once(settings: Settings) -> Iterator[SettingsProblem]:
    """Each stage is named once."""
    stages = settings.deployment.stages or ()
    if len(set(stages)) < len(stages):
        yield problem_with(
            settings,
            ["deployment.stages"],
            "each stage once",
            "deployment.workers says how many workers there are.",
        )


REDIS_SCHEMES = ("redis", "rediss", "unix")


def redis_address(settings: Settings) -> Iterator[SettingsProblem]:
    """`redis.url` is an address of a Redis."""
    url = settings.redis.url
    scheme, sign, _ = url.get_secret_value().partition("://") if url is not None else ("", "", "")
    if url is None or (sign and scheme in REDIS_SCHEMES):
        return
    # The rest of the address may hold a password.
    got = f"begins with {scheme}://" if sign else "has no scheme"
    yield SettingsProblem(
        ("redis.url",),
        f"redis.url {got}",
        "redis://host:6379/0, rediss://host:6379/0 (TLS) or unix:///path",
        "Correct redis.url.",
    )


def redis_login(settings: Settings) -> Iterator[SettingsProblem]:
    """Passwords and certificates of Redis fit its address."""
    redis = settings.redis
    url = urlsplit(redis.url.get_secret_value()) if redis.url is not None else urlsplit("")
    if redis.password is not None and (redis.url is None or url.password is not None):
        yield problem_with(
            settings,
            ["redis.password", "redis.url"],
            "one password, and an address to use it at",
            "Set redis.url without one.",
        )
    given = [f"redis.{name}" for name in TLS if getattr(redis, name) is not None]
    if given and url.scheme != "rediss":
        yield problem_with(
            settings,
            ["redis.url", *given],
            "rediss://, which is TLS",
            f"Set redis.url to that, or leave {given[0]} out.",
        )
    if (redis.tls_cert is None) != (redis.tls_key is None):
        yield problem_with(
            settings,
            ["redis.tls_cert", "redis.tls_key"],
            "a certificate and its key, or neither",
            "Set both.",
        )


def redis_warnings(settings: Settings) -> Iterator[str]:
    """A Redis that anybody in its network may write to."""
    redis = settings.redis
    url = urlsplit(redis.url.get_secret_value()) if redis.url is not None else urlsplit("")
    remote = url.scheme in ("redis", "rediss") and url.hostname not in (None, *LOOPBACK)
    if remote and not (url.password or redis.password or redis.tls_cert):
        yield (
            f"The Redis at {url.hostname} is on another machine and used without a password: "
            "whoever reaches it can read and change the run. Give it one, and set redis.password "
            "(docs/security.md)."
        )


def _unverified(settings: Settings) -> str:
    if settings.task.environment is not None:
        return "the environment gives the rewards"
    return "orchestrator.verification.enabled = false"


def deployment_warnings(settings: Settings) -> Iterator[str]:
    """Workers that are missing, that no rollout passes, or that are never added; an open Redis."""
    yield from redis_warnings(settings)
    plan = make_plan(settings)
    elsewhere = settings.deployment.count_elsewhere
    for stream in plan.streams:
        named = plan.named_teachers.get(teacher_of(stream) or "")
        here = any(plan.workers[kind] or elsewhere(kind) for kind in plan.kinds(stage_of(stream)))
        if not (named.workers if named else here):
            kind = plan.consumers(stream)[0]
            yield (
                f"No {kind} worker is started here: the run waits until one joins "
                f"(onstream worker {kind} {settings.run_dir})."
            )
    for stage, why in (
        ("act", "task.environment is unset"),
        ("verify", _unverified(settings)),
        ("score", f'trainer.loss.type = "{settings.trainer.loss.type}"'),
    ):
        if stage in (settings.deployment.stages or ()) and stage not in route_of(settings):
            yield f"deployment.stages names {stage}, but {why}: no {stage} worker runs."
    if settings.deployment.balance == "auto" and not scalable_stages(settings, plan):
        yield (
            'deployment.balance = "auto" has no effect: no stage may have more workers here '
            "(docs/health.md#more-workers-while-it-trains)."
        )
    if plan.workers.get("jobs") == 0 and not elsewhere("jobs"):
        yield (
            "No jobs worker is started here: evaluations and verifications in jobs wait until one "
            f"joins (onstream worker jobs {settings.run_dir})."
        )


DEPLOYMENT_RULES = (stages_once, redis_address, redis_login)
