"""Cuts what a child writes into frames."""

from __future__ import annotations

from collections.abc import Iterator

from onstream.pipeline.child_processes.messages import LENGTH


class FrameError(ValueError):
    """Bytes from a child that are no frame or no reply."""


class Frames:
    """Cuts the bytes of a stream into frames."""

    def __init__(self, max_bytes: int) -> None:
        """A frame of more than `max_bytes` is an error."""
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete with `data`.

        Raises:
            FrameError: a frame is too long.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise FrameError(f"a frame of {length} bytes; expected at most {self._max_bytes}")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield frame
