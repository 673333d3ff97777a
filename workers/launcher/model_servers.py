"""The vLLM servers of one launch, for the teacher and for the student."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from onstream.settings.chat_templates import own_teacher_arguments
from onstream.settings.gpus import Place
from onstream.settings.plan import Plan
from onstream.settings.root import Settings
from onstream.settings.stages import WorkerKind
from onstream.workers.launcher.vllm_server_process import ModelServer

TEACHER_SERVER = "teacher-server"
STUDENT_SERVER = "student-server"
KINDS = (TEACHER_SERVER, STUDENT_SERVER)
"""The kinds of child process that are such servers, and the commands that become one."""


class ModelServers:
    """The servers that `plan` asks for. `log_of` gives the log of a child by its name."""

    def __init__(self, settings: Settings, plan: Plan, log_of: Callable[[str], Path]) -> None:
        self._settings = settings
        self._plan = plan
        self._teacher: list[ModelServer] = []
        if plan.teacher_server:
            server = ModelServer(TEACHER_SERVER, TEACHER_SERVER, log_of(TEACHER_SERVER))
            self._teacher = [server]
        names = [f"{STUDENT_SERVER}-{index}" for index in range(plan.student_servers)]
        self._students = [ModelServer(name, STUDENT_SERVER, log_of(name)) for name in names]

    @property
    def all(self) -> list[ModelServer]:
        """Every one of them."""
        return [*self._teacher, *self._students]

    def asked_by(self, kind: WorkerKind, index: int) -> Sequence[ModelServer]:
        """The servers that the index-th worker of `kind` asks.

        The last of the external teacher's workers asks the teacher's, and the only generator the
        student's.
        """
        if kind == "generator":
            return self._students
        if kind == "teacher-external" and index == self._plan.workers[kind] - 1:
            return self._teacher
        return ()

    def overrides(self, kind: WorkerKind, servers: Sequence[ModelServer]) -> list[str]:
        """What makes a worker of `kind` ask `servers`, and nobody else."""
        if not servers:
            return []
        if kind == "teacher-external":
            return teacher_overrides(self._settings, self._plan, servers)
        return student_overrides(self._settings, servers)

    def model(self, server: ModelServer) -> str:
        """The model that `server` loads."""
        return self._plan.student if server in self._students else self._plan.teacher or ""

    def place(self, server: ModelServer) -> Place:
        """The place of its GPUs in the deployment."""
        if server in self._students:
            return "generator", self._students.index(server)
        return "teacher", 0

    def news(self) -> list[str]:
        """What has changed since the last call, a sentence each."""
        return [news for server in self.all if (news := server.news())]

    def waits(self) -> list[str]:
        """What a run that needs the servers waits for, in words."""
        return [wait for server in self.all for wait in server.waits()]

    def stop(self) -> None:
        """Stop to ask for their health, and let go of their ports."""
        for server in self.all:
            server.stop()


def may_ask(servers: Sequence[ModelServer]) -> bool:
    """Whether a worker that asks `servers` may start: all have served, and some are healthy."""
    all_have_served = all(server.has_served for server in servers)
    return all_have_served and any(server.healthy for server in servers)


def teacher_overrides(settings: Settings, plan: Plan, servers: Sequence[ModelServer]) -> list[str]:
    """What makes a `teacher-external` worker ask `servers` alone.

    By their fastest protocol, and without the budgets of paid endpoints.
    """
    client = {
        "base_url": _addresses(servers),
        "max_in_flight": settings.teacher_inference.max_in_flight,
        "protocol": "vllm-generate",
        "skip_model_check": "false",
        "requests_per_second": "null",
        "max_tokens_per_run": "null",
    }
    section = "orchestrator.teacher_model"
    overrides = [
        f"{section}.model.name={settings.teacher_inference.model.name or settings.model.name}",
        *(f"{section}.client.{name}={value}" for name, value in client.items()),
    ]
    arguments = own_teacher_arguments(settings)
    if arguments is not None:
        overrides.append(f"{section}.model.chat_template_kwargs={json.dumps(arguments)}")
    return overrides


def student_overrides(settings: Settings, servers: Sequence[ModelServer]) -> list[str]:
    """What makes a generator ask `servers`, each for as many completions as it decodes at once."""
    at_once = settings.inference.max_batch * settings.inference.data_parallel_size
    client = {
        "base_url": _addresses(servers),
        "max_in_flight": at_once,
        "requests_per_second": "null",
    }
    return [f"inference.client.{name}={value}" for name, value in client.items()]


def _addresses(servers: Sequence[ModelServer]) -> str:
    return json.dumps([server.base_url for server in servers])
