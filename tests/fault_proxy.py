"""A proxy in front of a real Redis that lets a test strike at one chosen call: before it, between
its work and its reply, or after.

It speaks RESP2 as `onstream.pipeline.redis.connection` does, one request at a time on each
connection, so that it knows which call passes. The product knows nothing of it: a worker is given
the proxy's address instead of the server's.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from onstream.pipeline.redis import scripts

Moment = Literal["before", "between", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "between", "after")
SCRIPTS = {
    value.sha: name for name, value in vars(scripts).items() if isinstance(value, scripts.Script)
}


class Cut(Exception):
    """The connection ends here: by a blow, or because the other side has closed."""


@dataclass
class Trap:
    """Strikes once, at the first `call` that comes while `when` holds. `blow` runs in the proxy,
    which waits for it.
    """

    call: str
    moment: Moment
    blow: Callable[[], None]
    when: Callable[[], bool] = lambda: True
    sprung: threading.Event = field(default_factory=threading.Event)
    _taken: threading.Lock = field(default_factory=threading.Lock)

    def catches(self, call: str) -> bool:
        """Whether `call` is the one to strike at; true once."""
        return (
            self.call == call
            and not self.sprung.is_set()
            and self.when()
            and self._taken.acquire(blocking=False)
        )

    def strike(self) -> None:
        """Strike now."""
        self.sprung.set()
        self.blow()


class FaultProxy:
    """Listens at `url`, and passes everything on to the server at `upstream` (a unix socket).
    `calls` are those that have passed.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.removeprefix("unix://")
        self._directory = Path(
            tempfile.mkdtemp(prefix="fault-")
        )  # short: a socket's path may have 107 bytes
        self.url = f"unix://{self._directory / 's'}"
        self.trap: Trap | None = None
        self.calls: set[str] = set()
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / "s"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        shutil.rmtree(self._directory)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        self._open |= {client, server}
        with (
            contextlib.suppress(OSError, Cut),
            client,
            server,
            client.makefile("rb") as requests,
            server.makefile("rb") as replies,
        ):
            server.connect(self._upstream)
            while request := read_message(requests):
                raw, arguments = request
                self._pass(client, server, replies, raw, call_of(arguments))
        self._open -= {client, server}

    def _pass(
        self, client: socket.socket, server: socket.socket, replies: BinaryIO, raw: bytes, call: str
    ) -> None:
        trap = self.trap if self.trap is not None and self.trap.catches(call) else None
        for moment in MOMENTS:
            if trap and trap.moment == moment:
                trap.strike()
            if moment == "before":
                server.sendall(raw)
                reply = read_message(replies)
                if reply is None:
                    raise Cut
            if moment == "between":
                client.sendall(reply[0])
        self.calls.add(call)


def read_message(file: BinaryIO) -> tuple[bytes, Any] | None:
    """One RESP2 value, as its bytes and what they say; None at the end of the stream."""
    line = file.readline()
    if not line:
        return None
    kind = line[:1]
    rest = line[1:-2]
    if kind == b"$" and int(rest) >= 0:
        body = file.read(int(rest) + 2)
        return line + body, body[:-2]
    if kind == b"*":
        parts = list(_parts(file, int(rest)))
        return line + b"".join(raw for raw, _ in parts), [value for _, value in parts]
    return line, rest


def _parts(file: BinaryIO, count: int) -> Iterator[tuple[bytes, Any]]:
    for _ in range(count):
        part = read_message(file)
        if part is None:
            raise Cut
        yield part


def call_of(arguments: list[bytes]) -> str:
    """A request by name: `HOP`, `XREADGROUP`; those that serve several ends by key or kind as well,
    `SET_KEY finished`.
    """
    name = arguments[0].decode().upper()
    if name in ("EVALSHA", "EVAL"):
        sha = arguments[1].decode() if name == "EVALSHA" else hashlib.sha1(arguments[1]).hexdigest()
        name = SCRIPTS[sha]
        keys = arguments[3 : 3 + int(arguments[2])]
        return f"{name} {_short(keys[-1])}" if name in ("SET_KEY", "DELETE_KEY") else name
    if name == "CLIENT":
        return f"CLIENT {arguments[1].decode().upper()}"
    if name in ("SADD", "EXISTS", "GET"):
        return f"{name} {_short(arguments[1])}"
    if name == "XPENDING":
        return "XPENDING idle" if b"IDLE" in arguments else "XPENDING"
    return name


def _short(key: bytes) -> str:
    return key.decode().rpartition("}:")[2]
