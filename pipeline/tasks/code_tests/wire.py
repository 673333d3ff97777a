"""What checker and program send each other: frames of JSON, and values as plain data.

A value is JSON's own null, bool, number or text, or a list that begins with a tag. What arrives is
rebuilt as exactly the built-in type that the tag names. So no method of the sender's is part of it.
It needs the standard library alone, and runs in both jails.
"""

from __future__ import annotations

import json
import struct
import sys
from collections import deque

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Iterable
    from typing import Any

    Refer = Callable[[Any], Any]

MAX_FRAME_BYTES = 4 << 20
MAX_DEPTH = 100
WIDE_BITS = 1024
"""Integers that are wider travel as hexadecimal text, which is read in linear time."""

SEQUENCES: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
}
BUILDERS = {name: kind for kind, name in SEQUENCES.items()}
TEXTS = {
    ("datetime", "datetime"): "isoformat",
    ("datetime", "date"): "isoformat",
    ("datetime", "time"): "isoformat",
    ("decimal", "Decimal"): "__str__",
    ("fractions", "Fraction"): "__str__",
}
"""Types of the standard library that travel as a text, and the method that writes it."""

_LENGTH = struct.Struct("<I")


class ChannelError(Exception):
    """What arrived is no frame or no value, or something cannot be sent."""


class Channel:
    """Sends and receives messages on a stream socket."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection

    def send(self, message: list[Any]) -> None:
        """Send `message`.

        Raises:
            ChannelError: it is too long.
            OSError: the other side is gone.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_FRAME_BYTES:
            raise ChannelError(f"{len(data)} bytes; expected at most {MAX_FRAME_BYTES}")
        self._connection.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> list[Any]:
        """The next message.

        Raises:
            ChannelError: none, since the other side is gone, or what came is no message.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ChannelError(f"a message of {length} bytes; expected at most {MAX_FRAME_BYTES}")
        data = self._exactly(length)
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"a message that is not JSON ({error})") from error
        if not isinstance(message, list) or not message:
            raise ChannelError("a message that is no list")
        return message

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._connection.recv(min(size - len(data), 1 << 16))
            except OSError as error:
                raise ChannelError(f"the other side is gone ({error})") from error
            if not part:
                raise ChannelError("the other side is gone")
            data += part
        return bytes(data)


def pack(value: Any, refer: Refer, depth: int = 0) -> Any:
    """`value` as data that JSON can hold. `refer` names what is not plain data.

    Raises:
        ChannelError: it is nested too deep.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() <= WIDE_BITS else ["int", hex(value)]
    if depth > MAX_DEPTH:
        raise ChannelError(f"a value nested deeper than {MAX_DEPTH}")
    if kind in SEQUENCES:
        return [SEQUENCES[kind], *[pack(item, refer, depth + 1) for item in value]]
    if kind is dict:
        pairs = [part for pair in value.items() for part in pair]
        return ["dict", *[pack(part, refer, depth + 1) for part in pairs]]
    small = _pack_small(value, kind)
    return refer(value) if small is None else small


def _pack_small(value: Any, kind: type) -> list[Any] | None:
    """`value` of a type that has no items; None where it is none of these."""
    if kind in (bytes, bytearray):
        return [kind.__name__, value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is range:
        bounds = (value.start, value.stop, value.step)
        return ["range", *map(hex, bounds)]
    if value is Ellipsis:
        return ["ellipsis"]
    module = kind.__module__
    if module == "datetime" and kind.__name__ == "timedelta":
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if kind is getattr(sys.modules.get(module), kind.__name__, None):
        writer = TEXTS.get((module, kind.__name__))
        if writer is not None:
            return ["text", module, kind.__name__, getattr(value, writer)()]
    return None


def unpack(data: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """The value that `pack` made `data` of. `resolve` gives what a reference stands for.

    Raises:
        ChannelError: it is no such data.
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is not list or not data or type(data[0]) is not str:
        raise ChannelError("a value without a tag")
    tag = data[0]
    if tag in BUILDERS:
        items = [unpack(item, resolve) for item in data[1:]]
        return _built(BUILDERS[tag], items)
    if tag == "dict":
        items = [unpack(item, resolve) for item in data[1:]]
        return _built(dict, zip(items[::2], items[1::2], strict=True))
    try:
        return _unpack_small(tag, data[1:], resolve)
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ChannelError(f"a value of type {tag!r} that is none ({error})") from error


def _built(kind: Callable[[Iterable[Any]], Any], items: Iterable[Any]) -> Any:
    try:
        return kind(items)
    except (TypeError, ValueError) as error:
        raise ChannelError(f"a {kind} with items that it cannot have ({error})") from error


def _unpack_small(tag: str, parts: list[Any], resolve: Callable[[list[Any]], Any]) -> Any:
    if tag == "int":
        [text] = parts
        return int(text, 16)
    if tag in ("bytes", "bytearray"):
        [text] = parts
        return bytes.fromhex(text) if tag == "bytes" else bytearray.fromhex(text)
    if tag == "complex":
        real, imaginary = parts
        return complex(float(real), float(imaginary))
    if tag == "range":
        start, stop, step = (int(text, 16) for text in parts)
        return range(start, stop, step)
    if tag == "ellipsis":
        return ...
    if tag == "timedelta":
        return _timedelta(parts)
    if tag == "text":
        return _from_text(*parts)
    return resolve([tag, *parts])


def _timedelta(parts: list[Any]) -> Any:
    from datetime import timedelta

    days, seconds, microseconds = (int(part) for part in parts)
    return timedelta(days, seconds, microseconds)


def _from_text(module: str, name: str, text: str) -> Any:
    if (module, name) not in TEXTS:
        raise ValueError("an unknown type")
    kind = getattr(__import__(module), name)
    return kind.fromisoformat(text) if module == "datetime" else kind(text)
