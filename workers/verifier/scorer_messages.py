"""The messages between a verifier and the scorer processes."""

from __future__ import annotations

from typing import Any

import msgspec

from onstream.pipeline.child_processes.messages import Reply


# verifier -> scorer process: a list of these in one frame
class ScoringRequest(msgspec.Struct, array_like=True, frozen=True):
    """One completion to score, and what the scorer gets beside it."""

    completion: str
    info: dict[str, Any]


# scorer process -> verifier: one frame each, in the order of the requests
class Verdict(Reply, array_like=True, frozen=True):
    """The result of one request: a reward and its parts, or why there is none (`unscored`)."""

    reward: float | None = None
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    unscored: str | None = None
