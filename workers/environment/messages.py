"""The messages between an environment worker and its children, which play."""

from __future__ import annotations

from typing import Any

import msgspec

from onstream.pipeline.child_processes.messages import Reply


# environment worker -> child: a list of these in one frame
class StartRequest(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Start an episode on a problem."""

    messages: list[dict[str, Any]]
    info: dict[str, Any]
    seed: int


class StepRequest(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer the student's `message`. `state` is msgpack."""

    state: bytes
    message: dict[str, Any]


Request = StartRequest | StepRequest


# child -> environment worker: one frame each, in the order of the requests
class Played(Reply, array_like=True, frozen=True):
    """What a start or a step brought; or the environment's own `fault`, in words.

    `ended_by` says that the environment was stopped: the episode ends, and its reward is 0.
    """

    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    state: bytes = b""
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    done: bool = False
    reward: float = 0.0
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    ended_by: str = ""
    fault: str | None = None


TIMED_OUT = Played(ended_by="timed_out")
CRASHED = Played(ended_by="crashed")
ROLLOUT_ERROR = Played(ended_by="rollout_error")
ENDINGS = tuple(played.ended_by for played in (TIMED_OUT, CRASHED, ROLLOUT_ERROR))
"""What may end an episode with a reward of 0: the part of the reward that says so."""
