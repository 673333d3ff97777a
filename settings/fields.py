"""Every setting as data: its name, scope, type, bound, unit and docstring, from the fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from onstream.settings.base import HidesLogin, Scope, Unit
from onstream.settings.root import Settings

_PLAIN_TYPES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    SecretStr: "secret text",
    Any: "value",
}


@dataclass(frozen=True)
class Setting:
    """One setting; `name` is its dotted path, as in `trainer.loss.teacher_tau`.

    In a section that comes in several types (`trainer.loss`), `types` are those that have this
    setting; none: all have it.
    """

    name: str
    field: FieldInfo
    types: tuple[str, ...] = ()

    @property
    def scope(self) -> Scope:
        """Who must agree on it."""
        return next(item for item in self.field.metadata if isinstance(item, Scope))

    @property
    def unit(self) -> str:
        """The unit of its value, or nothing."""
        return next((item.name for item in self.field.metadata if isinstance(item, Unit)), "")

    @property
    def doc(self) -> str:
        """Its docstring on one line."""
        return " ".join((self.field.description or "").split())

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        return self.doc.partition(". ")[0].rstrip(".") + "."

    @property
    def type(self) -> str:
        """What values look like, in words."""
        return _type_text(self.field.annotation)

    @property
    def bound(self) -> str:
        """What its value must keep to, or nothing."""
        return ", ".join(text for item in _constraints(self.field) for text in _bound_texts(item))

    @property
    def secret(self) -> bool:
        """Whether its value must never be shown."""
        annotation = self.field.annotation
        return annotation is SecretStr or SecretStr in get_args(annotation)

    @property
    def hides_login(self) -> bool:
        """Whether its value may hold a user and a password, which must not be shown."""
        return any(isinstance(item, HidesLogin) for item in self.field.metadata)

    def value(self, settings: Settings) -> Any:
        """Its value in `settings`, as plain JSON data; a secret that is set reads `***`.

        None in a section that is not there, or is of a type without this setting.
        """
        section, last = self._section(settings)
        value = getattr(section, last) if self.applies(settings) else None
        if self.secret and value not in (None, {}):
            return HIDDEN
        return without_login(_plain(value)) if self.hides_login else _plain(value)

    def applies(self, settings: Settings) -> bool:
        """Whether its section is there, and of a type that has it."""
        section, last = self._section(settings)
        return section is not None and last in type(section).model_fields

    def _section(self, settings: Settings) -> tuple[BaseModel | None, str]:
        """The section that holds it, None where it is unset, and its name in there."""
        *path, last = self.name.split(".")
        section: Any = settings
        for part in path:
            if isinstance(section, dict):
                section = section.get(part)
            elif section is not None:
                section = getattr(section, part)
        return section, last

    @property
    def default(self) -> Any:
        """Its default, as plain JSON data; None where it has none and must be given."""
        if self.field.is_required():
            return None
        return _plain(self.field.get_default(call_default_factory=True))


HIDDEN = "***"
NAME = "<name>"
"""Stands in the name of a setting for the name that a user gives to a section."""
_LOGIN = re.compile(r"(?P<scheme>\w*:?/+)?[^\s\"'\[\]]*@")


def without_login(value: Any) -> Any:
    """`value`, an address or a list of them, with `***` for users and passwords.

    >>> without_login(["http://me:secret@host/v1", "http://host/v1"])
    ['http://***@host/v1', 'http://host/v1']
    """
    if isinstance(value, list | tuple):
        return [without_login(item) for item in value]
    if not isinstance(value, str):
        return value
    return _LOGIN.sub(lambda found: f"{found['scheme'] or ''}{HIDDEN}@", value)


@cache
def known() -> dict[str, Setting]:
    """Every setting by its name, in the order of the sections. Those of a section that users name
    are there once, with `NAME` in its place.
    """
    return {setting.name: setting for setting in _walk(Settings, "")}


def known_in(settings: Settings) -> dict[str, Setting]:
    """Every setting by its name, with those of each section that `settings` name, at the end."""
    found = {name: setting for name, setting in known().items() if NAME not in name}
    named = [setting for name, setting in known().items() if NAME in name]
    for section in dict.fromkeys(setting.name.partition(".")[0] for setting in named):
        for key in getattr(settings, section):
            for setting in named:
                name = setting.name.replace(NAME, key, 1)
                found[name] = replace(setting, name=name)
    return found


def setting_named(name: str) -> Setting | None:
    """The setting `name`, also of a section that a user has named; None where there is none.

    >>> setting_named("teachers.math.weight").unit
    'parts'
    """
    setting = known().get(general_name(name))
    return setting and replace(setting, name=name)


def general_name(name: str) -> str:
    """`name`, of a setting or section, with `NAME` in place of what a user has named it.

    >>> general_name("teachers.math.local"), general_name("run.seed")
    ('teachers.<name>.local', 'run.seed')
    """
    section, first_dot, inner = name.partition(".")
    _, second_dot, rest = inner.partition(".")
    if first_dot and f"{section}.{NAME}" in sections():
        return f"{section}.{NAME}{second_dot}{rest}"
    return name


@cache
def sections() -> dict[str, type[BaseModel]]:
    """Every section by its dotted name, in their order."""
    return dict(_walk_sections(Settings, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        variants = variants_of(field)
        inner = section_of(field)
        if variants:
            yield from _walk_variants(variants, f"{prefix}{name}.")
        elif inner is not None:
            yield from _walk(inner, f"{prefix}{_in_name(name, field)}.")
        else:
            yield Setting(f"{prefix}{name}", field)


def _walk_variants(variants: Mapping[str, type[BaseModel]], prefix: str) -> Iterator[Setting]:
    """The settings of a section that comes in several types, each once."""
    common = _common_base(variants).model_fields
    for name, field in common.items():
        yield Setting(f"{prefix}{name}", field)
    types: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    for type_name, variant in variants.items():
        for name, field in variant.model_fields.items():
            if name not in common:
                types.setdefault(name, []).append(type_name)
                fields.setdefault(name, field)
    for name, field in fields.items():
        yield Setting(f"{prefix}{name}", field, tuple(types[name]))


def _walk_sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        variants = variants_of(field)
        inner = section_of(field)
        if variants:
            yield f"{prefix}{name}", _common_base(variants)
        elif inner is not None:
            yield f"{prefix}{_in_name(name, field)}", inner
            yield from _walk_sections(inner, f"{prefix}{_in_name(name, field)}.")


def _in_name(name: str, field: FieldInfo) -> str:
    """The part of a setting's name that the section in `field` makes."""
    return f"{name}.{NAME}" if _holds_named_sections(field) else name


def _holds_named_sections(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict and section_of(field) is not None


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that `field` holds (also where it may be unset), or None for a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def variants_of(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The classes of a section that comes in several types, by `type`; none for other fields."""
    if field.discriminator is None:
        return {}
    return {variant.model_fields["type"].default: variant for variant in get_args(field.annotation)}


def _common_base(variants: Mapping[str, type[BaseModel]]) -> type[BaseModel]:
    first, *others = variants.values()
    shared = (base for base in first.__mro__ if all(issubclass(other, base) for other in others))
    base: type[BaseModel] = next(shared)
    return base


def plain_location(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where pydantic found an error, without the types that it puts in the path.

    They are those of sections that come in several types, and those that a value may have.
    """
    plain: list[str | int] = []
    rest = [part for part in location if part != "[key]"]  # said of a name that a section has
    model: type[BaseModel] | None = Settings
    while rest:
        part = rest.pop(0)
        plain.append(part)
        field = model.model_fields.get(str(part)) if model is not None else None
        model = section_of(field) if field is not None else None
        if field is not None and rest and _holds_named_sections(field):
            plain.append(rest.pop(0))
        elif field is not None and rest and rest[0] in variants_of(field):
            model = variants_of(field)[str(rest.pop(0))]
        elif field is not None and rest and _has_several_types(field):
            rest.pop(0)
    return tuple(plain)


def _has_several_types(field: FieldInfo) -> bool:
    """Whether a plain value may be of one type or another, beside unset."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    return _is_union(field.annotation) and len(kinds) > 1


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) is Union or type(annotation).__name__ == "UnionType"


def _constraints(field: FieldInfo) -> Iterator[Any]:
    """What `field` says of its values, and what each of several types says of its own."""
    yield from field.metadata
    kinds = get_args(field.annotation) if _has_several_types(field) else ()
    for kind in kinds:
        for item in getattr(kind, "__metadata__", ()):
            yield from getattr(item, "metadata", [item])


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return (
        value if isinstance(value, str | int | float | None) else str(value)
    )  # a date in `task.args`, say


def _type_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in args)
    if _is_union(annotation):
        return " or ".join(_type_text(arg) for arg in args if arg is not NoneType)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"list of {_type_text(args[0])}"
    if origin is tuple:
        return f"list of {len(args)}: {', '.join(_type_text(arg) for arg in args)}"
    if origin is list:
        return f"list of {_type_text(args[0])}"
    if origin is dict:
        return "table"
    if hasattr(annotation, "__metadata__"):
        return _type_text(annotation.__origin__)
    return _PLAIN_TYPES.get(annotation, str(annotation))


def _bound_texts(item: Any) -> Iterator[str]:
    for attribute, sign in (("gt", "> "), ("ge", "≥ "), ("lt", "< "), ("le", "≤ ")):
        if (bound := getattr(item, attribute, None)) is not None:
            yield f"{sign}{bound}"
    if (length := getattr(item, "min_length", None)) is not None:
        yield f"at least {length} long"
    if (pattern := getattr(item, "pattern", None)) is not None:
        yield f"matches {pattern}"
