"""What `onstream check --online` asks: the run's Redis, and the endpoints of its models."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from onstream.pipeline import telemetry
from onstream.pipeline.errors import UserError
from onstream.pipeline.http import Endpoint, EndpointError, require_model
from onstream.pipeline.http.endpoint import http_client
from onstream.pipeline.redis.connection import Connection
from onstream.settings.plan import Plan
from onstream.settings.problems import SettingsProblem
from onstream.settings.redis import address
from onstream.settings.root import Settings
from onstream.settings.sections.client import EndpointSettings
from onstream.settings.sections.run import LogSettings

PATIENCE_S = 5.0
"""How long a server may take to answer."""


@dataclass(frozen=True)
class Asked:
    """A model at endpoints: their `section` of the settings, and where its name stands there."""

    section: str
    client: EndpointSettings
    model: str
    named: str


def redis_problems(settings: Settings) -> list[SettingsProblem]:
    """Why the Redis of `redis.url` cannot carry the run; empty where it can, or none is named."""
    url = address(settings.redis)
    if url is None:
        return []
    # What is logged of a server that is away would stand in the middle of the output.
    telemetry.configure("check", "check", settings.run.name, LogSettings(level="error"))
    try:
        connection = Connection(
            url,
            settings.run.name,
            consumer=f"check-{os.getpid()}",
            block_s=PATIENCE_S,
            connect_timeout_s=min(PATIENCE_S, settings.redis.connect_timeout),
        )
        with contextlib.closing(connection):
            connection.check_server()
    except UserError as error:
        return [_problem("redis.url", error)]
    return []


def endpoint_problems(settings: Settings, plan: Plan) -> list[SettingsProblem]:
    """Why the endpoints that `plan` asks cannot be used; empty where they can."""
    return asyncio.run(_ask_all(list(_asked(settings, plan))))


def _asked(settings: Settings, plan: Plan) -> Iterator[Asked]:
    orchestrator = settings.orchestrator
    teacher = orchestrator.teacher_model
    if plan.external_teacher is not None and teacher is not None:
        section = "orchestrator.teacher_model"
        yield Asked(section, teacher.client, teacher.model.name, "")
    for name, one in settings.teachers.items():
        if one.external is not None and plan.named_teachers[name].workers:
            section = f"teachers.{name}.external"
            yield Asked(section, one.external.client, one.external.model.name, "")
    source = orchestrator.teacher_rollout_model
    if source is not None:
        section = "orchestrator.teacher_rollout_model"
        yield Asked(section, source.client, source.model.name, "")
    judge = orchestrator.judge_model
    if judge is not None:
        yield Asked("orchestrator.judge_model", judge.client, judge.model.name, "")
    inference = settings.inference
    if inference.engine == "server" and source is None:
        named = "inference.client.model" if inference.client.model else "model.name"
        model = inference.client.model or settings.model.name
        yield Asked("inference", inference.client, model, named)


async def _ask_all(models: list[Asked]) -> list[SettingsProblem]:
    found = []
    for asked in models:
        async with http_client(asked.client) as http:
            for url in asked.client.base_url:
                endpoint = Endpoint(url, http, min(PATIENCE_S, asked.client.timeout))
                found += await _ask(endpoint, asked)
    return found


async def _ask(endpoint: Endpoint, asked: Asked) -> list[SettingsProblem]:
    setting = f"{asked.section}.client.base_url"
    try:
        if asked.client.skip_model_check:
            await endpoint.models()
        else:
            await require_model(endpoint, asked.model, asked.section, asked.named)
    except UserError as error:
        return [_problem(setting, error)]
    except EndpointError as error:
        if asked.client.skip_model_check and error.status is not None:
            return []  # it answers, and needs no list
        return [
            SettingsProblem(
                (setting,),
                f"{setting}: no answer from {endpoint.name} ({error})",
                "an endpoint that lists its models",
                f"Start the server, or correct {setting}.",
            )
        ]
    return []


def _problem(setting: str, error: UserError) -> SettingsProblem:
    return SettingsProblem((setting,), error.got, error.expected, error.next_step)
