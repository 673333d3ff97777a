"""What each source says of the settings: files, environment variables and overrides.

Reading is pydantic-settings'. Each file, variable and override is read on its own, so that every
problem is found in one go and each value is known to come from somewhere.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from pydantic_settings import BaseSettings, EnvSettingsSource, TomlConfigSettingsSource
from pydantic_settings import SettingsError as SourceError
from pydantic_settings.sources.utils import parse_env_vars

from onstream.pipeline.errors import looked_in
from onstream.settings.fields import HIDDEN, setting_named
from onstream.settings.problems import (
    PREFIX,
    SettingsProblem,
    setting_of,
    unknown_variable,
    without_secrets,
)
from onstream.settings.retired import without_other_types, without_retired
from onstream.settings.root import Settings

FREE_FORM = (
    ("task", "args"),
    ("inference", "extra_args"),
    ("trainer", "loss", "args"),
    ("model", "chat_template_kwargs"),
    ("teacher_inference", "model", "chat_template_kwargs"),
    ("orchestrator", "teacher_model", "model", "chat_template_kwargs"),
    ("orchestrator", "teacher_rollout_model", "model", "chat_template_kwargs"),
)
"""Tables whose keys are not settings."""

FILE = "_FILE"
"""At the end of a secret's variable: its value is in the file of that name."""

# Sources read only its fields and its configuration, which every model has.
_SETTINGS = cast(type[BaseSettings], Settings)


@dataclass(frozen=True)
class Fragment:
    """What one source says: nested `values`, and the `origin` to name when they are wrong."""

    origin: str
    values: dict[str, Any]


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


def fragments(
    files: Sequence[Path | str],
    overrides: Sequence[str],
    environ: Mapping[str, str],
    problems: list[SettingsProblem],
) -> Iterable[Fragment]:
    """Every source's fragment, weakest first; what cannot be read is added to `problems`."""
    for file in files:
        yield from _of_file(file, problems)
    # An empty variable is one that compose passed on without a value.
    names = [name for name, text in environ.items() if name.upper().startswith(PREFIX) and text]
    # Shorter names first: `X__Y` refines a table in `X`.
    for name in sorted(names, key=lambda name: (name.count("__"), name)):
        if _is_secret_file(name):
            yield from _of_secret_file(name, Path(environ[name]), environ, problems)
        else:
            yield from _of_variable(name, environ[name], problems)
    for override in overrides:
        yield from _of_override(override, problems)


def settings_file(given: Path | str) -> Path:
    """The TOML file meant by a file, a run's directory, or the name of a run under `runs`."""
    path = Path(given)
    if path.is_dir():
        return path / "settings.toml"
    by_name = Path("runs") / path / "settings.toml"
    return by_name if not path.exists() and by_name.exists() else path


def _of_file(file: Path | str, problems: list[SettingsProblem]) -> Iterable[Fragment]:
    path = settings_file(file)
    if not path.exists():
        expected = "a TOML file, or the directory or name of a run"
        got = f"no file {path}{looked_in(path)}"
        problems.append(SettingsProblem((), got, expected, f"Check the path.{_near_run(path)}"))
        return
    try:
        values = TomlConfigSettingsSource(_SETTINGS, path).toml_data
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        next_step = "Correct the file; docs/settings.md lists the settings."
        problems.append(SettingsProblem((), f"{path}: {error}", "a TOML file", next_step))
        return
    values = without_other_types(_without_hidden(values))
    if path == Path(file) and not _is_of_a_run(path):
        yield Fragment(str(path), values)
        return
    yield Fragment(str(path), without_retired(values))
    if path != Path(file):  # the run is where its file is, wherever it was moved
        run = path.resolve().parent
        yield Fragment(str(path), {"run": {"dir": str(run.parent), "name": run.name}})


def _near_run(path: Path) -> str:
    """A question that names the run whose name is nearest to that of `path`, where one is near."""
    folders = (path.parent, Path("runs"))
    runs = [file.parent for folder in folders for file in folder.glob("*/settings.toml")]
    near = get_close_matches(path.name, [run.name for run in runs], n=1)
    meant = next((run for run in runs if run.name in near), None)
    return f" Did you mean {meant}?" if meant else ""


def _is_of_a_run(path: Path) -> bool:
    """Whether `path` is the settings file that a run wrote down, perhaps by an earlier version."""
    return path.name == "settings.toml" and (path.parent / "plan.json").exists()


def _of_variable(name: str, text: str, problems: list[SettingsProblem]) -> Iterable[Fragment]:
    try:
        values = _OneVariable(name, text, prefix=PREFIX, delimiter="__", case_sensitive=False)()
    except SourceError:
        problems.append(_not_json(name, name[len(PREFIX) :].lower().replace("__", "."), text))
        return
    if values:
        yield Fragment(name, _with_json_leaves(values))
    else:
        problems.append(unknown_variable(name))


def _is_secret_file(name: str) -> bool:
    """Whether the variable `name` holds the path of a file with a secret."""
    secret = setting_of(name[: -len(FILE)]) if name.upper().endswith(FILE) else None
    return secret is not None and secret.secret


def _of_secret_file(
    name: str, path: Path, environ: Mapping[str, str], problems: list[SettingsProblem]
) -> Iterable[Fragment]:
    """What the file of a secret says, as its variable would.

    An empty file counts as not set, like an empty variable.
    """
    plain = name[: -len(FILE)]
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        expected = "a file with the secret in it"
        next_step = "Check the path and who may read it."
        problems.append(SettingsProblem((), f"{name}={path}: {error}", expected, next_step))
        return
    if text and environ.get(plain):
        next_step = f"Unset {plain}, which others may see."
        problems.append(SettingsProblem((), f"both {plain} and {name}", "one of them", next_step))
    elif text:
        for fragment in _of_variable(plain, text, problems):
            yield Fragment(f"{name}={path}", fragment.values)


def _of_override(override: str, problems: list[SettingsProblem]) -> Iterable[Fragment]:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        next_step = "For example --set trainer.max_steps=20."
        problems.append(SettingsProblem((), f"--set {override}", "section.name=value", next_step))
        return
    try:
        values = _OneVariable(name, text.strip(), prefix="", delimiter=".", case_sensitive=True)()
    except SourceError:
        problems.append(_not_json(f"--set {name}", name, text))
        return
    # A name whose section is unknown yields nothing. As a key it is refused later, like any other
    # unknown one.
    yield Fragment(f"--set {name}", _with_json_leaves(values) if values else {name: text})


def _not_json(origin: str, name: str, text: str) -> SettingsProblem:
    setting = setting_named(name)
    expected = f"JSON for {setting.type}" if setting else "a table as JSON"
    next_step = f"It is: {setting.summary}" if setting else "docs/settings.md lists the settings."
    got = f"{origin}={without_secrets(name, text)}"
    return SettingsProblem((name,), got, expected, next_step)


def _with_json_leaves(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the texts in tables of free form as the numbers and lists that they spell.

    Their fields have no types to go by.
    """
    for path in FREE_FORM:
        table: Any = values
        for part in path:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict):
            texts = {key: text for key, text in table.items() if isinstance(text, str)}
            table.update({key: _json_or_text(text) for key, text in texts.items()})
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_hidden(values: dict[str, Any]) -> dict[str, Any]:
    """`values` less the secrets that a run's settings file hides, logins in addresses too."""
    return {key: _given(value) for key, value in values.items() if value != HIDDEN}


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_hidden(value)
    if isinstance(value, list):
        return [_given(item) for item in value]
    return value.replace(f"//{HIDDEN}@", "//") if isinstance(value, str) else value
