"""Settings of earlier versions, and what takes their place.

A run that an earlier version began has them in its plan and in its `settings.toml`. There they are
ignored at their default; anywhere else, and at any other value, they are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onstream.settings.fields import known


@dataclass(frozen=True)
class RetiredSetting:
    """A setting that is gone: the default at which it said nothing, and the next step."""

    default: Any
    next_step: str


def _count(setting: str) -> RetiredSetting:
    return RetiredSetting(1, f"Set deployment.workers.{setting} instead.")


_UNFILTERED = "Leave it out: training samples from the student's whole distribution."

RETIRED: dict[str, RetiredSetting] = {
    "inference.sampling.top_p": RetiredSetting(1.0, _UNFILTERED),
    "inference.sampling.top_k": RetiredSetting(0, _UNFILTERED),
    "inference.sampling.min_p": RetiredSetting(0.0, _UNFILTERED),
    "deployment.generators": _count("generator"),
    "deployment.verifiers": _count("verifier"),
    "deployment.external_teachers": _count("teacher_external"),
    "deployment.jobs": _count("jobs"),
    "deployment.scale": RetiredSetting(
        {},
        "Set the count in deployment.workers instead, and name the kind in "
        "deployment.started_elsewhere.",
    ),
}


def says_nothing(name: str, value: Any) -> bool:
    """Whether `name` is a retired setting, and `value` the default at which it may be ignored."""
    return name in RETIRED and RETIRED[name].default == value


def without_retired(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The nested `values` of a run's own settings file, less retired settings that say nothing."""
    return dict(_still_said(values, section))


def _still_said(values: dict[str, Any], section: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{section}{key}"
        if isinstance(value, dict):
            value = without_retired(value, f"{name}.")
        if not says_nothing(name, value):
            yield key, value


def without_other_types(values: dict[str, Any]) -> dict[str, Any]:
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
