"""What is wrong with settings: problems, all told at once, in words that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.fields import (
    HIDDEN,
    NAME,
    Setting,
    general_name,
    known,
    plain_location,
    sections,
    setting_named,
    without_login,
)
from onstream.settings.retired import RETIRED
from onstream.settings.root import Settings
from onstream.settings.toml import shown

PREFIX = "ONSTREAM_"


@dataclass(frozen=True)
class SettingsProblem:
    """One thing to correct.

    `names` are the settings it concerns; `got` says which value came from where.
    """

    names: tuple[str, ...]
    got: str
    expected: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.got}; expected {self.expected}. {self.next_step}"


class SettingsError(UserError):
    """Every problem of the settings at once, one to a line."""

    def __init__(self, problems: Sequence[SettingsProblem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(
            first.got, expected=first.expected, next_step=first.next_step, exit=Exit.USAGE
        )

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def problem_with(
    settings: Settings, names: list[str], expected: str, next_step: str
) -> SettingsProblem:
    """The problem of the settings `names`, with their values."""
    values = " with ".join(f"{name} = {_value(settings, name)}" for name in names)
    return SettingsProblem(tuple(names), values, expected, next_step)


def _value(settings: Settings, name: str) -> str:
    setting = setting_named(name)
    return "unset" if setting is None else shown(setting.value(settings))


def nearest(name: str) -> str | None:
    """The known setting or section most like the dotted `name`, or None where nothing is near."""
    names = [known_name for known_name in (*known(), *sections()) if NAME not in known_name]
    last = name.rpartition(".")[2]
    elsewhere = [candidate for candidate in names if candidate.rpartition(".")[2] == last]
    if elsewhere:  # the right key in a wrong section
        return (get_close_matches(name, elsewhere, n=1, cutoff=0.0) or elsewhere)[0]
    return next(iter(get_close_matches(name, names, n=1, cutoff=0.6)), None)


def unknown_key(name: str, origin: str) -> SettingsProblem:
    """The problem of a key that no section has, whatever its source."""
    near = nearest(name)
    if origin.upper().startswith(PREFIX):
        near = variable_of(near) if near else None
        got = f"unknown setting: the environment variable {origin}"
    else:
        got = f"unknown setting {name}{'' if origin.startswith('--set') else f' in {origin}'}"
    retired = RETIRED.get(name)
    if retired is not None:
        got = got.replace("unknown", "retired", 1)
    next_step = _advice(near) if retired is None else retired.next_step
    return SettingsProblem((name,), got, "the name of a setting", next_step)


def unknown_variable(variable: str) -> SettingsProblem:
    """The problem of an `ONSTREAM_` variable that belongs to no section."""
    return unknown_key(variable[len(PREFIX) :].lower().replace("__", "."), variable)


def setting_of(variable: str) -> Setting | None:
    """The setting whose whole value the environment variable `variable` gives, if there is one."""
    return setting_named(variable[len(PREFIX) :].lower().replace("__", "."))


def variable_of(name: str) -> str:
    """The environment variable of the setting `name`."""
    return PREFIX + name.upper().replace(".", "__")


def field_problem(detail: Mapping[str, Any], origins: Mapping[str, str]) -> SettingsProblem:
    """The problem of one pydantic error `detail`, told with where the value came from."""
    location = detail["loc"]
    name = ".".join(str(part) for part in location if isinstance(part, str))
    origin = _origin(name, origins)
    setting = setting_named(name)
    if detail["type"] == "extra_forbidden" and setting is None:
        return unknown_key(name, origin)
    if detail["type"] == "extra_forbidden" and setting is not None:
        return _of_another_type(setting, detail, origin)
    if detail["type"] == "missing":
        return _missing(name, detail["input"], setting)
    value = _value_text(name, detail["input"], spelled=origin.startswith(("--set", PREFIX)))
    item = "".join(f"[{part}]" for part in location if isinstance(part, int))
    got = f"{name}{item} = {value}{_from(origin)}"
    return SettingsProblem(
        (name,),
        got,
        _expected(detail),
        f"It is: {setting.summary}" if setting else f"[{name}] is a table of settings.",
    )


def _of_another_type(setting: Setting, detail: Mapping[str, Any], origin: str) -> SettingsProblem:
    """The problem of a setting that its section has with other values of `type` alone."""
    kind = setting.name.rpartition(".")[0] + ".type"
    spelled = origin.startswith(("--set", PREFIX))
    value = _value_text(setting.name, detail["input"], spelled=spelled)
    types = " or ".join(f'"{name}"' for name in setting.types)
    return SettingsProblem(
        (setting.name, kind),
        f"{kind} = {shown(detail['given_type'])} with {setting.name} = {value}{_from(origin)}",
        f"{setting.name} only where {kind} is {types}",
        f"Leave {setting.name} out, or set {kind}.",
    )


def _missing(name: str, section: Any, setting: Setting | None) -> SettingsProblem:
    """The problem of a setting that has no default."""
    beside = name.rpartition(".")[0] + ".type"
    given = f"{beside} = {shown(section['type'])}" if "type" in section else "a section"
    return SettingsProblem(
        (name,),
        f"{given} without {name}",
        setting.type if setting else "a value",
        f"Set {name}: {setting.summary}" if setting else f"Set {name}.",
    )


def plain_detail(detail: Mapping[str, Any]) -> dict[str, Any]:
    """The pydantic error `detail` with its place by the names of settings.

    In a section that comes in several types pydantic puts the type into the path, and finds fault
    with the whole section where the type is none of them.
    """
    plain = {**detail, "loc": plain_location(detail["loc"])}
    if len(plain["loc"]) < len(detail["loc"]):
        plain["given_type"] = detail["loc"][-2]
    if detail["type"] == "union_tag_invalid":
        plain["loc"] = (*plain["loc"], "type")
        plain["input"] = detail["input"]["type"]
        types = get_args(known()[".".join(plain["loc"])].field.annotation)
        *others, last = map(repr, types)
        plain["msg"] = f"Input should be {', '.join(others)} or {last}"
    return plain


def _expected(detail: Mapping[str, Any]) -> str:
    a_table = detail["type"] in ("model_type", "model_attributes_type")
    message = "a table" if a_table else str(detail["msg"])
    for start in ("Input should be ", "Value should have ", "Value error, ", "String should "):
        if message.startswith(start):
            return ("text to " if start == "String should " else "") + message[len(start) :]
    return message[:1].lower() + message[1:]


def without_secrets(name: str, value: Any) -> Any:
    """`value`, given for the setting, the section or the item `name`, as messages may show it."""
    name = general_name(name)
    within = [
        setting
        for known_name, setting in known().items()
        if f"{known_name}.".startswith(f"{name}.") or f"{name}.".startswith(f"{known_name}.")
    ]
    if any(setting.secret for setting in within):
        return HIDDEN
    return without_login(value) if any(setting.hides_login for setting in within) else value


def _value_text(name: str, value: Any, *, spelled: bool) -> str:
    """`value` of `name` in short; one `spelled` as text by its source reads as it was typed."""
    value = without_secrets(name, value)
    try:
        text = value if spelled and isinstance(value, str) else shown(value)
    except TypeError:  # a TOML date, which no setting takes
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _from(origin: str) -> str:
    """Where a value came from, for the end of a line; the command line is in sight anyway."""
    return "" if origin.startswith("--set") else f" (from {origin})"


def _origin(name: str, origins: Mapping[str, str]) -> str:
    while name and name not in origins:
        name = name.rpartition(".")[0]
    return origins.get(name, "the defaults")


def _advice(near: str | None) -> str:
    return f"Did you mean {near}?" if near else "docs/settings.md lists all settings."
