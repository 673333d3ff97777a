"""Settings from their sources: command line, environment, TOML files, defaults.

The strongest comes first in this list, and of several TOML files the last one given wins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from onstream.settings.fields import known
from onstream.settings.problems import SettingsError, SettingsProblem, field_problem, plain_detail
from onstream.settings.retired import kept_defaults
from onstream.settings.root import Settings
from onstream.settings.rules import problems_of
from onstream.settings.sources import fragments


@dataclass
class Resolved:
    """What the sources add up to. `settings` is None only where nothing usable is left.

    With problems, `settings` holds defaults in place of the values that are wrong, so that the rest
    can be looked at. `origins` says which source each setting comes from.
    """

    settings: Settings | None = None
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[SettingsProblem] = field(default_factory=list)


def load_settings(
    files: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings that files, environment and overrides add up to.

    `environ` is by default the process's own, and an override is `"a.b=c"`. A file may also be a
    run's directory or its name: then the settings that the run wrote down.

    Raises:
        SettingsError: carries every problem found, cross-field ones included.
    """
    resolved = resolve(files, overrides, environ)
    if resolved.problems or resolved.settings is None:
        raise SettingsError(resolved.problems)
    return resolved.settings


def resolve(
    files: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """As `load_settings`, but returns the problems beside whatever could be resolved."""
    resolved = Resolved()
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for fragment in list(fragments(files, overrides, environ, resolved.problems)):
        _merge(values, fragment.values)
        resolved.origins.update(dict.fromkeys(_leaf_names(fragment.values), fragment.origin))
    resolved.settings = _validate(values, resolved)
    if resolved.settings is not None and not resolved.problems:
        _keep_defaults(resolved.settings, values, resolved)
    return resolved


def _keep_defaults(settings: Settings, values: dict[str, Any], resolved: Resolved) -> None:
    """Where the run has begun with earlier defaults, and nothing is said of them, go on so."""
    plan = settings.run_dir / "plan.json"
    kept = {
        name: value
        for name, value in kept_defaults(plan).items()
        if name not in resolved.origins and known()[name].applies(settings)
    }
    for name, value in kept.items():
        *path, last = name.split(".")
        nested: Any = {last: value}
        for part in reversed(path):
            nested = {part: nested}
        _merge(values, nested)
    if kept:
        resolved.origins.update(dict.fromkeys(kept, str(plan)))
        resolved.settings = _validate(values, resolved)


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _copy(value)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _leaf_names(values: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaf_names(value, f"{prefix}{key}.")


def _validate(values: dict[str, Any], resolved: Resolved) -> Settings | None:
    """The settings of `values`; a wrong one is left at its default, and told in the problems."""
    wrong: set[str] = set()
    while True:
        try:
            settings = Settings.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
            details = _told_once([plain_detail(detail) for detail in errors])
            resolved.problems += [
                field_problem(detail, resolved.origins)
                for detail in details
                if not _follows(detail, wrong)
            ]
            removed = {name for detail in details for name in _remove(values, _wrong_part(detail))}
            wrong |= removed
            if not removed:
                return None
            continue
        resolved.problems += [
            problem for problem in problems_of(settings) if not wrong.intersection(problem.names)
        ]
        return settings


def _follows(detail: Mapping[str, Any], wrong: Set[str]) -> bool:
    """Whether a value is missing only because it was wrong, and has been told of already."""
    return detail["type"] == "missing" and ".".join(map(str, detail["loc"])) in wrong


def _wrong_part(detail: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The place of what is to be left out: of a section that lacks a value, the section."""
    location: tuple[str | int, ...] = detail["loc"]
    return location[:-1] if detail["type"] == "missing" else location


def _told_once(details: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`details` less a list said to be too short only because its items were wrong.

    Where a value may be of several types, there is one for each: they become one.
    """
    wrong_lists = {detail["loc"][:-1] for detail in details if isinstance(detail["loc"][-1], int)}
    told: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for detail in details:
        location = detail["loc"]
        if location in wrong_lists:
            continue
        if location in told:
            msg = f"{told[location]['msg']} or {detail['msg'].removeprefix('Input should be ')}"
            told[location] = {**told[location], "msg": msg}
        else:
            told[location] = detail
    return list(told.values())


def _remove(values: dict[str, Any], location: tuple[str | int, ...]) -> Iterable[str]:
    """Take what is at `location`, or the setting it is a part of, out of `values`.

    Yields its name.
    """
    inner = values
    path = [part for part in location if isinstance(part, str)]
    for depth, part in enumerate(path):
        if depth == len(path) - 1 or not isinstance(inner.get(part), dict):
            inner.pop(part, None)
            yield ".".join(path[: depth + 1])
            return
        inner = inner[part]
