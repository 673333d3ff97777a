"""The messages between a worker, its fork server and its child processes.

Worker and child speak over a stream socket, in frames: 4 bytes of length, then msgpack. Worker and
fork server speak over a packet socket, one message a packet.
"""

from __future__ import annotations

import struct

import msgspec

PACKET_BYTES = 1 << 17

LENGTH = struct.Struct("<I")
"""What comes before each frame: its length in bytes."""


# child -> worker: one frame each, in the order of the requests
class Reply(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a child says to one request; each kind of work has its own.

    `retires` says that the process ends after this reply, and that the next request is not the
    cause.
    """

    retires: bool = False


# worker -> fork server
class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The first message.

    `loader` is `module:function`: given `settings`, JSON, it returns the `ChildWork` of every
    child. `what` names that work in messages. `max_memory_bytes` is what one child may take.
    """

    loader: str
    what: str
    settings: bytes
    max_memory_bytes: int


class Spawn(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Fork the process of `slot`. The socket that it speaks over comes with this message."""

    slot: int


class Kill(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Kill the process of `slot` and all it has started."""

    slot: int


# fork server -> worker
class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The work is loaded."""


class NotLoaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The work cannot be loaded: the parts of a UserError."""

    got: str
    expected: str
    next_step: str


class ChildExited(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The process of `slot` has ended.

    `status` is its exit status, or the negative number of the signal that killed it.
    """

    slot: int
    status: int
