"""What a child of an environment worker does: it calls the environment, whatever that may raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from onstream.pipeline.child_processes.child import ChildWork
from onstream.pipeline.child_processes.errors import reason_of
from onstream.pipeline.environments import (
    Environment,
    Started,
    Stepped,
    load_environment,
    state_type,
    tool_schema,
)
from onstream.pipeline.tasks import Problem, RolloutError, read_score
from onstream.settings.root import Settings
from onstream.settings.stages import STATE_BYTES
from onstream.workers.environment.messages import (
    ROLLOUT_ERROR,
    Played,
    Request,
    StartRequest,
    StepRequest,
)

MESSAGES_BYTES = 1 << 19
"""The most that one start or step may say."""

_decode_requests = msgspec.msgpack.Decoder(list[Request]).decode
_encode = msgspec.msgpack.Encoder().encode


def load(settings: bytes) -> ChildWork:
    """The work of children with `settings`, those of task and run as JSON.

    Raises:
        UserError: the environment cannot be loaded.
    """
    environment = load_environment(Settings.model_validate_json(settings))
    return ChildWork(_decode_requests, EnvironmentPlayer(environment).answer)


class EnvironmentPlayer:
    """Plays `environment`, and checks what it returns."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._decode_state = msgspec.msgpack.Decoder(state_type(environment)).decode

    def answer(self, request: Request) -> Played:
        """What the environment does. Whatever it raises becomes a fault of its own."""
        try:
            if isinstance(request, StartRequest):
                return self._start(request)
            return self._step(request)
        # sys.exit() and the like are its failures too, and must not end the process
        except BaseException as error:
            called = "start" if isinstance(request, StartRequest) else "step"
            return Played(fault=reason_of(error, getattr(self._environment, called)))

    def _start(self, request: StartRequest) -> Played:
        problem = Problem(request.messages, request.info)
        started = self._environment.start(problem, request.seed)
        if not isinstance(started, Started):
            raise TypeError(f"start returned a {type(started).__name__}; expected a Started")
        if not started.messages:
            raise ValueError("start gave no messages; expected what the student is asked")
        return Played(
            _checked(started.messages),
            _state(started.state),
            [tool_schema(tool) for tool in started.tools],
        )

    def _step(self, request: StepRequest) -> Played:
        try:
            stepped = self._environment.step(self._decode_state(request.state), request.message)
        except RolloutError:
            return ROLLOUT_ERROR
        if not isinstance(stepped, Stepped):
            raise TypeError(f"step returned a {type(stepped).__name__}; expected a Stepped")
        if not (stepped.done or stepped.messages):
            raise ValueError("step gave no messages and did not end the episode")
        reward, parts = read_score(stepped.reward)
        messages = _checked(stepped.messages)
        return Played(
            messages, _state(stepped.state), done=stepped.done, reward=reward, parts=parts
        )


def _checked(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """`messages`, each with a role and a text.

    Raises:
        ValueError: one is none, is the assistant's, which the student alone writes, or they are too
            long.
    """
    for message in messages:
        fits = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not fits or message.get("role") not in ("system", "user", "tool"):
            raise ValueError(
                f"a message is {str(message)[:80]}; expected a role of system, user or tool, and "
                "a text as content"
            )
    if (size := len(_encode(messages))) > MESSAGES_BYTES:
        raise ValueError(f"the messages have {size} bytes; expected at most {MESSAGES_BYTES}")
    return list(messages)


def _state(state: Any) -> bytes:
    """`state` as an episode carries it.

    Raises:
        ValueError: it is too long.
        TypeError: it is no data.
    """
    encoded = _encode(state)
    if len(encoded) > STATE_BYTES:
        raise ValueError(f"the state has {len(encoded)} bytes; expected at most {STATE_BYTES}")
    return encoded
