"""What an environment is: it starts an episode on a problem, and answers the student's turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, get_type_hints

from onstream.pipeline.tasks.base import Message, Problem
from onstream.pipeline.tasks.scorers import Score

Tool = Callable[..., Any]
"""A function that the student may call, with a type at each parameter, and a docstring."""


@dataclass(frozen=True)
class Started:
    """The beginning of an episode: what the student reads, and the environment's own state.

    `tools` are the functions that the student is told of.
    """

    messages: list[Message]
    state: Any = None
    tools: list[Tool] = field(default_factory=list)


@dataclass(frozen=True)
class Stepped:
    """What a step brings: messages for the student, the next state, and what it is worth.

    The reward of an episode is the sum of those of its steps, and so are its named parts. `done`
    ends the episode; no step without messages goes on.
    """

    messages: list[Message] = field(default_factory=list)
    state: Any = None
    done: bool = False
    reward: Score = 0.0


class Environment(Protocol):
    """Plays one side of an episode. It keeps nothing: all that it needs is in the state.

    The state is data that msgspec encodes, of 64 KiB at most, and comes back as the type at the
    parameter `state` of `step`. The same arguments give the same results, in any process.
    """

    def start(self, problem: Problem, seed: int) -> Started:
        """Begin an episode on `problem`. The members of a group have the same `seed`."""
        ...

    def step(self, state: Any, message: Message) -> Stepped:
        """Answer the student's `message`, a text with the role `assistant`."""
        ...


def state_type(environment: Environment) -> Any:
    """The type of the state of `environment`: that at the parameter `state` of its `step`."""
    return get_type_hints(environment.step).get("state", Any)
