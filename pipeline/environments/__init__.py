"""Environments: the other side of an episode of several turns."""

from __future__ import annotations

from onstream.pipeline.environments.base import Environment, Started, Stepped, state_type
from onstream.pipeline.environments.tools import ToolError, call_tools, tool_schema
from onstream.pipeline.errors import UserError
from onstream.pipeline.import_path import import_function, search_modules_in
from onstream.settings.root import Settings

BUILTIN = {
    "calculator": "onstream.pipeline.environments.calculator:Calculator",
    "sort-turns": "onstream.pipeline.environments.sort_turns:SortTurns",
}
"""By `task.environment`: the class of the environment."""

__all__ = [
    "Environment",
    "Started",
    "Stepped",
    "ToolError",
    "call_tools",
    "load_environment",
    "state_type",
    "tool_schema",
]


def load_environment(settings: Settings) -> Environment:
    """The environment that `task.environment` names.

    Raises:
        UserError: there is none of that name, or it cannot be imported or made.
    """
    name = settings.task.environment
    assert name is not None, "only for a run with an environment"
    if ":" not in name and name not in BUILTIN:
        raise UserError(
            f"`task.environment` = {name!r} is not an environment",
            expected=f"one of {', '.join(BUILTIN)}, or `module:name` of your own",
            next_step="Correct `task.environment`.",
        )
    search_modules_in(settings.run.modules)
    made = import_function(BUILTIN.get(name, name), setting="task.environment")
    try:
        environment: Environment = made()
        state_type(environment)
    except Exception as error:  # the user's own code, and may raise anything
        raise UserError(
            f"`task.environment` = {name!r} makes no environment: {type(error).__name__}: {error}",
            expected="a class or function without arguments, with `start` and `step`",
            next_step="docs/environments.md has an example.",
        ) from error
    return environment
