"""Paths among the settings: which there are, and the same settings with all of them absolute.

A run keeps its paths absolute, so that it goes on from any directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from onstream.settings.base import Section
from onstream.settings.fields import known_in
from onstream.settings.root import Settings

MODELS = ("model.name", "teacher_inference.model.name")
"""Settings that name a model by a directory or by an id of the hub."""
HUGGING_FACE = "hf:"
FUNCTIONS = ("task.scorer", "trainer.loss.function")
"""Settings that name a function of the user's own, in a module."""

AnySection = TypeVar("AnySection", bound=Section)


def absolute_model(name: str) -> str:
    """The model `name` with its whole path, where it is a directory here; else as it is."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.is_dir() else name


def with_absolute_paths(settings: Settings) -> Settings:
    """`settings` with every path that leads from the working directory made absolute."""
    for name, value in _absolute(settings):
        settings = _changed(settings, name.split("."), value)
    return settings


def given_paths(settings: Settings) -> dict[str, str]:
    """The settings of the run that `with_absolute_paths` changes, as they were given."""
    known = known_in(settings)
    changed = [name for name, _ in _absolute(settings) if known[name].scope.kind == "run"]
    return {name: known[name].value(settings) for name in changed}


def _absolute(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Each setting whose value has to change, and its new value."""
    known = known_in(settings)
    for name, setting in known.items():
        value = setting.value(settings)
        if setting.type == "path" and value is not None and _is_path(name, value):
            yield name, Path(os.path.abspath(value))
    for name in _own_models(settings):
        value = known[name].value(settings)
        if value is not None and absolute_model(value) != value:
            yield name, absolute_model(value)
            if name == "model.name" and settings.inference.client.model is None:
                yield from _name_at_servers(settings)
    template = settings.model.chat_template
    if template is not None and Path(template).expanduser().exists():
        absolute = os.path.abspath(Path(template).expanduser())
        if absolute != template:
            yield "model.chat_template", absolute
    task = settings.task.name
    data = task.removeprefix(HUGGING_FACE)
    if task != data and Path(data).exists() and not Path(data).is_absolute():
        yield "task.name", HUGGING_FACE + os.path.abspath(data)
    has_functions = any(":" in str(known[name].value(settings)) for name in FUNCTIONS)
    if has_functions and settings.run.modules is None:
        yield "run.modules", Path.cwd()


def _is_path(name: str, value: str) -> bool:
    """Whether `value` leads from the working directory: a bare program is one on PATH."""
    on_path = name == "redis.server_bin" and os.sep not in value
    return not os.path.isabs(value) and not on_path


def _own_models(settings: Settings) -> Iterator[str]:
    """The settings that name models of this machine, and not also one at an endpoint."""
    teacher = settings.orchestrator.teacher_model
    for name in MODELS:
        if teacher is None or known_in(settings)[name].value(settings) != teacher.model.name:
            yield name
    yield from (f"teachers.{name}.local.model.name" for name in settings.teachers)


def _name_at_servers(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Servers that are there know the student by the name that was given."""
    if settings.inference.client.base_url:
        yield "inference.client.model", settings.model.name


def _changed(section: AnySection, path: list[str], value: Any) -> AnySection:
    first, *rest = path
    inner = getattr(section, first)
    if isinstance(inner, dict) and len(rest) > 1:  # sections that the user has named
        name, *rest = rest
        value = {**inner, name: _changed(inner[name], rest, value)}
    elif rest:
        value = _changed(inner, rest, value)
    return section.model_copy(update={first: value})
