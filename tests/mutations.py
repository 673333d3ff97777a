"""Records as an adversary or a broken program might write them to Redis: real ones, changed
somewhere.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from onstream.pipeline.records import Rollout, Ticket, Tombstone

ODD: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    1e300,
    -1e300,
    1e-300,
    0,
    -1,
    2**31,
    2**53,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    -(10**12),
    0.0,
    None,
    True,
    "",
    "x" * 70_000,
    "train",
    b"",
    b"\xff",
    b"\x00\x00\xc0\x7f",
    [],
    {},
    [[[]]],
    {"a": {1: msgspec.msgpack.Ext(5, b"odd")}},
    msgspec.msgpack.Ext(-1, b"\xff" * 12),
    {None: 1},
)
"""What a field may be replaced by."""
ODD_FLOATS = tuple(
    bytes.fromhex(text)
    for text in ("0000c07f", "0000807f", "000080ff", "99769e7f", "99769eff", "00007041", "a4707d3f")
)
"""float32: NaN, ±infinity, ±2e38, 15 and 0.99."""
ODD_NUMBERS = (b"9" * 30, b"1" * 5000, b"-1", b"0", b"", b"abc", b"\xff", b" 1", "²".encode())
"""What the field `n` of an entry may say."""


@dataclass(frozen=True)
class MutatedEntry:
    """The fields of a stream entry."""

    fields: dict[bytes, bytes]

    @property
    def payload(self) -> bytes:
        """The record's bytes."""
        return self.fields.get(b"b", b"")


class Mutator:
    """Makes mutated entries of whole records; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def entry(self, record: Ticket | Rollout | Tombstone, issued: int) -> MutatedEntry:
        """An entry of `record`, changed in one to three places, or in the bytes of the whole."""
        number = str(record.number).encode()
        payload = msgspec.msgpack.encode(record)
        how = self._random.random()
        if how < 0.1:
            return MutatedEntry(self._other_fields(number, payload, issued))
        if how < 0.2:
            payload = self._other_bytes(payload)
        else:
            for _ in range(self._random.randint(1, 3)):
                payload = self._other_field(payload)
        return MutatedEntry({b"n": number, b"b": payload})

    def bytes_of(self, payload: bytes) -> bytes:
        """`payload`, changed."""
        if self._random.random() < 0.5:
            return self._other_bytes(payload)
        return self._other_field(payload)

    def _other_fields(self, number: bytes, payload: bytes, issued: int) -> dict[bytes, bytes]:
        odd = (*ODD_NUMBERS, str(issued + self._random.randint(1, 10**6)).encode())
        entries = (
            {b"n": self._random.choice(odd), b"b": payload},
            {b"n": self._random.choice(odd), b"b": self._other_field(payload)},
            {b"n": number},
            {b"b": payload},
            {b"odd": b"fields"},
        )
        return self._random.choice(entries)

    def _other_bytes(self, payload: bytes) -> bytes:
        if not payload:  # an earlier change has cut all of it
            return b"\xff"
        at = self._random.randrange(len(payload))
        if self._random.random() < 0.3:
            return payload[:at]
        return payload[:at] + bytes([self._random.randrange(256)]) + payload[at + 1 :]

    def _other_field(self, payload: bytes) -> bytes:
        """`payload` with one field replaced, cut, doubled or, in an array, overwritten."""
        try:
            whole = msgspec.msgpack.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            return self._other_bytes(payload)
        whole = copy.deepcopy(whole)
        holder = whole
        while isinstance(holder, list | dict) and holder:
            key = self._key(holder)
            value = holder[key]
            inner = isinstance(value, list | dict) and value
            if not inner or self._random.random() < 0.15:
                self._change(holder, key)
                break
            holder = value
        return msgspec.msgpack.encode(whole)

    def _key(self, holder: list[Any] | dict[Any, Any]) -> Any:
        if isinstance(holder, dict):
            return self._random.choice(list(holder))
        return self._random.randrange(len(holder))

    def _change(self, holder: Any, key: Any) -> None:
        value = holder[key]
        if isinstance(value, bytes) and len(value) >= 4 and self._random.random() < 0.6:
            holder[key] = self._other_array(value)
        elif isinstance(holder, list) and self._random.random() < 0.2:
            holder[key : key + 1] = self._random.choice(([], [value, value]))
        else:
            holder[key] = copy.deepcopy(self._random.choice(ODD))

    def _other_array(self, value: bytes) -> bytes:
        at = self._random.randrange(len(value) // 4) * 4
        changes: Sequence[bytes] = (
            value[:at] + self._random.choice(ODD_FLOATS) + value[at + 4 :],
            value[:-1],
            value[:-4],
            value + value[:4],
            bytes(len(value)),
            b"\xff" * len(value),
        )
        return self._random.choice(changes)
