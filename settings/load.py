"""Settings from their sources, strongest first: command line, environment, TOML files (a later one
wins), defaults.

Reading is pydantic-settings'. Each file, variable and override is read on its own, so that every
problem is found in one go and each value is known to come from somewhere.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource
from pydantic_settings import SettingsError as SourceError
from pydantic_settings.sources.utils import parse_env_vars

from onstream.settings.fields import HIDDEN, known
from onstream.settings.problem import Problem, SettingsError
from onstream.settings.retired import without_retired
from onstream.settings.root import Settings
from onstream.settings.rules import problems_of
from onstream.settings.unknown import (
    PREFIX,
    field_problem,
    plain_detail,
    setting_of,
    unknown_variable,
)

FREE_FORM = (("task",), "args"), (("inference",), "extra_args"), (("trainer", "loss"), "args")
"""Tables whose keys are not settings, by section and name."""
FILE = "_FILE"
"""At the end of a secret's variable: its value is in the file of that name."""
_SETTINGS = cast(
    type[BaseSettings], Settings
)  # sources ask for its fields and config alone, which every model has


@dataclass(frozen=True)
class Fragment:
    """What one source says: nested `values`, and the `origin` to name when they are wrong."""

    origin: str
    values: dict[str, Any]


@dataclass
class Resolved:
    """What came of the sources. `settings` is None only where nothing usable is left.

    With problems, `settings` holds defaults in place of the values that are wrong, so that the rest
    can be looked at.
    """

    settings: Settings | None = None
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _OneVariable(EnvSettingsSource):
    """A single `name` with its text, read as pydantic-settings reads an environment variable."""

    def __init__(
        self, name: str, text: str, *, prefix: str, delimiter: str, case_sensitive: bool
    ) -> None:
        self._variable = {name: text}
        super().__init__(
            _SETTINGS,
            case_sensitive,
            prefix,
            env_nested_delimiter=delimiter,
            env_parse_none_str="null",
        )

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return parse_env_vars(
            self._variable, self.case_sensitive, self.env_ignore_empty, self.env_parse_none_str
        )


def load_settings(
    files: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings that `files`, `environ` (by default the process's own) and `overrides`
    (`"a.b=c"`) add up to.

    A file may also be a run's directory or its name: then the settings that the run wrote down.

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
    fragments = list(
        _fragments(files, overrides, os.environ if environ is None else environ, resolved.problems)
    )
    values: dict[str, Any] = {}
    for fragment in fragments:
        _merge(values, fragment.values)
        resolved.origins.update(dict.fromkeys(_leaf_names(fragment.values), fragment.origin))
    resolved.settings = _validate(values, resolved)
    return resolved


def _fragments(
    files: Sequence[Path | str],
    overrides: Sequence[str],
    environ: Mapping[str, str],
    problems: list[Problem],
) -> Iterable[Fragment]:
    """Every source's fragment, weakest first; what cannot be read is added to `problems`."""
    for file in files:
        yield from _file_fragments(file, problems)
    # An empty variable is one that compose passed on without a value. Shorter names first: `X__Y`
    # refines a table in `X`.
    names = sorted(
        (name for name, text in environ.items() if name.upper().startswith(PREFIX) and text),
        key=lambda name: (name.count("__"), name),
    )
    for name in names:
        if (
            name.upper().endswith(FILE)
            and (secret := setting_of(name[: -len(FILE)])) is not None
            and secret.secret
        ):
            yield from _secret_fragment(name, Path(environ[name]), environ, problems)
        else:
            yield from _variable_fragment(name, environ[name], problems)
    for override in overrides:
        yield from _override_fragment(override, problems)


def _file_fragments(file: Path | str, problems: list[Problem]) -> Iterable[Fragment]:
    path = settings_file(file)
    try:
        values = TomlConfigSettingsSource(_SETTINGS, path).toml_data if path.exists() else None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(
            Problem(
                (),
                f"{path}: {error}",
                "a TOML file",
                "Mend the file; docs/settings.md lists the settings.",
            )
        )
        return
    if values is None:
        problems.append(
            Problem(
                (),
                f"no file {path}",
                "a TOML file, or the directory or name of a run",
                "Check the path.",
            )
        )
        return
    values = _without_hidden(values)
    if path != Path(file) or _is_of_a_run(path):
        values = without_retired(values)
    yield Fragment(str(path), _without_other_types(values))
    if path != Path(file):  # a run's own settings, wherever the run was moved
        run = path.resolve().parent
        yield Fragment(str(path), {"run": {"dir": str(run.parent), "name": run.name}})


def _is_of_a_run(path: Path) -> bool:
    """Whether `path` is the settings file that a run wrote down, perhaps by an earlier version."""
    return path.name == "settings.toml" and (path.parent / "plan.json").exists()


def settings_file(given: Path | str) -> Path:
    """The TOML file meant by a file, a run's directory, or the name of a run under `runs`."""
    path = Path(given)
    if path.is_dir():
        return path / "settings.toml"
    by_name = Path("runs") / path / "settings.toml"
    return by_name if not path.exists() and by_name.exists() else path


def _variable_fragment(name: str, text: str, problems: list[Problem]) -> Iterable[Fragment]:
    try:
        values = _OneVariable(name, text, prefix=PREFIX, delimiter="__", case_sensitive=False)()
    except SourceError:
        problems.append(_not_json(name, name[len(PREFIX) :].lower().replace("__", "."), text))
        return
    if values:
        yield Fragment(name, _with_json_leaves(values))
    else:
        problems.append(unknown_variable(name))


def _secret_fragment(
    name: str, path: Path, environ: Mapping[str, str], problems: list[Problem]
) -> Iterable[Fragment]:
    """What the file of a secret says, as its variable would; an empty one counts as not set, like
    an empty variable.
    """
    plain = name[: -len(FILE)]
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(
            Problem(
                (),
                f"{name}={path}: {error}",
                "a file with the secret in it",
                "Check the path and who may read it.",
            )
        )
        return
    if text and environ.get(plain):
        problems.append(
            Problem(
                (),
                f"both {plain} and {name}",
                "one of them",
                f"Unset {plain}, which others may see.",
            )
        )
    elif text:
        yield from (
            Fragment(f"{name}={path}", fragment.values)
            for fragment in _variable_fragment(plain, text, problems)
        )


def _override_fragment(override: str, problems: list[Problem]) -> Iterable[Fragment]:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        problems.append(
            Problem(
                (),
                f"--set {override}",
                "section.name=value",
                "For example --set trainer.max_steps=20.",
            )
        )
        return
    try:
        values = _OneVariable(name, text.strip(), prefix="", delimiter=".", case_sensitive=True)()
    except SourceError:
        problems.append(_not_json(f"--set {name}", name, text))
        return
    # A name whose section is unknown yields nothing; as a key it is refused below like any other
    # unknown one.
    yield Fragment(f"--set {name}", _with_json_leaves(values) if values else {name: text})


def _not_json(origin: str, name: str, text: str) -> Problem:
    setting = known().get(name)
    expected = f"JSON for {setting.type}" if setting else "a table as JSON"
    return Problem(
        (name,),
        f"{origin}={text}",
        expected,
        f"It is: {setting.summary}" if setting else "docs/settings.md lists the settings.",
    )


def _with_json_leaves(values: dict[str, Any]) -> dict[str, Any]:
    """Texts inside the tables of free form as the numbers and lists they spell: their fields have
    no types to go by.
    """
    for path, name in FREE_FORM:
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        args = section.get(name) if isinstance(section, dict) else None
        if isinstance(args, dict):
            args.update(
                {key: _json_or_text(text) for key, text in args.items() if isinstance(text, str)}
            )
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_hidden(values: dict[str, Any]) -> dict[str, Any]:
    """`values` less the secrets that a run's settings file hides."""
    return {
        key: _without_hidden(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != HIDDEN
    }


def _without_other_types(values: dict[str, Any]) -> dict[str, Any]:
    """`values` less the settings, at their defaults, that a section of its `type` does not have.

    The settings files of earlier runs hold those of `rl` beside `trainer.loss.type = "sft"`.
    """
    for setting in known().values():
        *path, last = setting.name.split(".")
        section: Any = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not setting.types or not isinstance(section, dict) or last not in section:
            continue
        other = section.get("type", setting.types[0]) not in setting.types
        if other and section[last] == setting.default:
            del section[last]
    return values


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
    """The settings of `values`, those that are wrong left at their defaults and told in
    `resolved.problems`.
    """
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
    """`details` less a list said to be too short only because its items were wrong."""
    wrong_lists = {detail["loc"][:-1] for detail in details if isinstance(detail["loc"][-1], int)}
    return [detail for detail in details if detail["loc"] not in wrong_lists]


def _remove(values: dict[str, Any], location: tuple[str | int, ...]) -> Iterable[str]:
    """Take what is at `location`, or the setting it is a part of, out of `values`; yields the name."""
    inner = values
    path = [part for part in location if isinstance(part, str)]
    for depth, part in enumerate(path):
        if depth == len(path) - 1 or not isinstance(inner.get(part), dict):
            inner.pop(part, None)
            yield ".".join(path[: depth + 1])
            return
        inner = inner[part]
