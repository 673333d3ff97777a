"""What a verifier, its nursery and the scoring children say to each other.

Verifier and child speak over a stream socket, in frames: 4 bytes of length, then msgpack. Verifier
and nursery speak over a packet socket, one message a packet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

PACKET_BYTES = 1 << 17

_LENGTH = struct.Struct("<I")


class WireError(ValueError):
    """Bytes from a child that are no frame or no verdict."""


# verifier -> child: a list of these in one frame
class ScoringRequest(msgspec.Struct, array_like=True, frozen=True):
    """One completion to score."""

    completion: str
    info: dict[str, Any]


# child -> verifier: one frame each, in the order of the jobs
class Verdict(msgspec.Struct, array_like=True, frozen=True):
    """What became of one job: a reward and its parts, or `unscored` with the reason.

    With `retires` set, the child ends after this verdict through no fault of the next job.
    """

    reward: float | None = None
    parts: dict[str, float] = {}
    unscored: str | None = None
    retires: bool = False


# verifier -> nursery
class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The first message: the settings of task and verification, as JSON, and the memory that one
    child may take.
    """

    settings: bytes
    max_memory_bytes: int


class Spawn(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Fork the child of `slot`, which speaks over the socket that comes with this message."""

    slot: int


class Kill(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Kill the child of `slot` and all it has started."""

    slot: int


# nursery -> verifier
class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The scorer is loaded."""


class ScorerNotLoaded(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The scorer cannot be loaded: the parts of a UserError."""

    got: str
    expected: str
    next_step: str


class ScorerExited(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The child of `slot` has ended: its exit status, or the negative number of the signal that
    killed it.
    """

    slot: int
    status: int


class Frames:
    """Cuts the bytes of a stream into frames."""

    def __init__(self, max_bytes: int) -> None:
        """A frame of more than `max_bytes` is an error."""
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete with `data`.

        Raises:
            WireError: a frame is too long.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise WireError(f"a frame of {length} bytes; expected at most {self._max_bytes}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield frame


def framed(body: bytes) -> bytes:
    """`body` as a frame."""
    return _LENGTH.pack(len(body)) + body
