"""What settings sections are made of: strict models whose fields say their scope and unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Scope:
    """Who must agree on a setting.

    A `run` setting defines the run: it is written once to Redis, and a worker that disagrees stops.
    A `changeable` one may differ when a run is resumed. A `worker` setting concerns one process
    alone.
    """

    kind: Literal["run", "worker"]
    changeable: bool = False


RUN = Scope("run")
CHANGEABLE = Scope("run", changeable=True)
WORKER = Scope("worker")


@dataclass(frozen=True)
class Unit:
    """The unit of a setting, as the docs print it."""

    name: str


class HidesLogin:
    """Marks a setting with addresses that may hold a user and a password: they are not shown."""


class Section(BaseModel):
    """A group of settings. Unknown keys are errors; each field's docstring is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        frozen=True,
        allow_inf_nan=False,
    )
