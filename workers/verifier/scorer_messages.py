"""The messages between a verifier, its fork server and the scorer processes.

Verifier and scorer process speak over a stream socket, in frames: 4 bytes of length, then msgpack.
Verifier and fork server speak over a packet socket, one message a packet.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

PACKET_BYTES = 1 << 17

LENGTH = struct.Struct("<I")
"""What comes before each frame: its length in bytes."""


# verifier -> scorer process: a list of these in one frame
class ScoringRequest(msgspec.Struct, array_like=True, frozen=True):
    """One completion to score, and what the scorer gets beside it."""

    completion: str
    info: dict[str, Any]


# scorer process -> verifier: one frame each, in the order of the requests
class Verdict(msgspec.Struct, array_like=True, frozen=True):
    """The result of one request: a reward and its parts, or why there is none (`unscored`).

    `retires` says that the process ends after this verdict, and that the next request is not the
    cause.
    """

    reward: float | None = None
    parts: dict[str, float] = {}
    unscored: str | None = None
    retires: bool = False


# verifier -> fork server
class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The first message.

    It has the settings of task and verification, as JSON, and the memory that one scorer process
    may take.
    """

    settings: bytes
    max_memory_bytes: int


class Spawn(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Fork the process of `slot`. The socket that it speaks over comes with this message."""

    slot: int


class Kill(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Kill the process of `slot` and all it has started."""

    slot: int


# fork server -> verifier
class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The scorer is loaded."""


class ScorerNotLoaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The scorer cannot be loaded: the parts of a UserError."""

    got: str
    expected: str
    next_step: str


class ScorerExited(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The process of `slot` has ended.

    `status` is its exit status, or the negative number of the signal that killed it.
    """

    slot: int
    status: int
