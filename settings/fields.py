"""Every setting as data: its dotted name, scope, type, bound, unit and docstring, read from the
sections' fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from onstream.settings.base import Scope, Unit
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
    """One setting; `name` is its dotted path, as in `trainer.loss.teacher_tau`."""

    name: str
    field: FieldInfo

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
        return ", ".join(text for item in self.field.metadata for text in _bound_texts(item))

    @property
    def secret(self) -> bool:
        """Whether its value must never be shown."""
        annotation = self.field.annotation
        return annotation is SecretStr or SecretStr in get_args(annotation)

    def value(self, settings: Settings) -> Any:
        """Its value in `settings`, as plain JSON data; a secret that is set reads `***`. None in a
        section that is not there.
        """
        value: Any = settings
        for part in self.name.split("."):
            value = None if value is None else getattr(value, part)
        if self.secret and value not in (None, {}):
            return HIDDEN
        return _plain(value)

    @property
    def default(self) -> Any:
        """Its default, as plain JSON data."""
        return _plain(self.field.get_default(call_default_factory=True))


HIDDEN = "***"


@cache
def known() -> dict[str, Setting]:
    """Every setting by its name, in the order of the sections."""
    return {setting.name: setting for setting in _walk(Settings, "")}


@cache
def sections() -> dict[str, type[BaseModel]]:
    """Every section by its dotted name, in their order."""
    return dict(_walk_sections(Settings, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield Setting(f"{prefix}{name}", field)
        else:
            yield from _walk(inner, f"{prefix}{name}.")


def _walk_sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if (inner := section_of(field)) is not None:
            yield f"{prefix}{name}", inner
            yield from _walk_sections(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that `field` holds (also where it may be unset), or None for a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


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
    if origin is Union or type(annotation).__name__ == "UnionType":
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
