"""What settings sections are made of: strict models whose fields say their scope and unit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict


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


def listed(value: Any) -> Any:
    """`value` as a list where it is one text, or the JSON text of a list: an environment variable
    holds either.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return [value.strip()]


OWN_TEMPLATE_ARGUMENTS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""What a chat template is called with here, or is no variable of it."""


def _not_our_own(arguments: dict[str, Any]) -> dict[str, Any]:
    taken = [name for name in OWN_TEMPLATE_ARGUMENTS if name in arguments]
    if taken:
        raise ValueError(f"variables of the template, without {', '.join(taken)}")
    return arguments


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_not_our_own)]
"""Variables that a chat template reads, with their values."""
