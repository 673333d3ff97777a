"""Settings of earlier versions, and what takes their place; defaults that have changed since.

A run that an earlier version began has retired settings in its plan and in its `settings.toml`.
There they are ignored at their default; anywhere else, and at any other value, they are errors. It
keeps the defaults that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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


EARLIER_DEFAULTS: dict[str, Any] = {
    "orchestrator.group_size": 8,
    "trainer.loss.teacher_top_k": 0,
    "trainer.optim.lr": 1e-5,
    "trainer.optim.warmup": 0,
}
"""What settings of scope `run` were by default in the version before, where that has changed."""


def kept_defaults(plan: Path) -> dict[str, Any]:
    """The settings at earlier defaults in the run's plan at `plan`; none where there is no plan."""
    try:
        kept = json.loads(plan.read_bytes())["run_settings"]
        return {name: was for name, was in EARLIER_DEFAULTS.items() if kept.get(name) == was}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # there is none, or one that is told of where it is read


def is_default(name: str, value: Any) -> bool:
    """Whether `value` is the default of the setting `name`, or was in the version before."""
    return value in (known()[name].default, EARLIER_DEFAULTS.get(name, known()[name].default))


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
        if other and is_default(setting.name, section[last]):
            del section[last]
    return values
