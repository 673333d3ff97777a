"""A real HTTP server on this machine with hand-written faults, for what no real model server gives
on demand.

What works is tested on real servers, in tests/vllm and tests/modes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

Body = dict[str, Any]


@dataclass
class Answer:
    """A reply. `cut` breaks the connection in its middle; `drip_s` sends it slowly, a byte at a
    time.
    """

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    drip_s: float = 0.0


@dataclass
class Asked:
    """A request that came; `body` is None for a GET."""

    path: str
    headers: httpx.Headers
    body: Body | None
    at: float


Fault = Callable[[Asked, Answer], Answer]
"""Answers in the server's stead; gets what was asked and the right answer."""
NOT_FOUND = Answer(404, {"detail": "Not Found"})


def status(code: int, words: str = "out of order", *, retry_after: str | None = None) -> Fault:
    """Replies with `code`."""
    answer = Answer(
        code,
        {"error": {"message": words}},
        {} if retry_after is None else {"Retry-After": retry_after},
    )
    return lambda asked, right: answer


def cut(asked: Asked, right: Answer) -> Answer:
    """Cuts the connection in the middle of the reply."""
    return replace(right, cut=True)


def drip(asked: Asked, right: Answer) -> Answer:
    """Sends a byte now and then, so that no single read waits long."""
    return replace(right, drip_s=0.02)


class FaultyServer:
    """Answers every POST by `answer`, which may be replaced at any time, and `GET /v1/models` with
    `models`.

    `faults` answer one POST each in its stead, in order; `forever` answers all of them. With a
    `key`, nobody else is let in. It keeps its port over a stop.
    """

    def __init__(
        self,
        answer: Callable[[Body], Answer],
        models: Sequence[str] = ("teacher",),
        *,
        key: str | None = None,
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.models = models
        self.key = key
        self.port = port
        self.faults: deque[Fault] = deque()
        self.forever: Fault | None = None
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0
        self._awaited = 0
        self._came_together = threading.Event()
        self._came_together.set()
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()

    @property
    def base_url(self) -> str:
        """The address, as settings give it."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[Body]:
        """What was posted so far, in order."""
        return [asked.body for asked in self.asked if asked.body is not None]

    def start(self) -> FaultyServer:
        """Listen; at the same port as before, after a stop."""
        self.stopped.clear()
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", self.port), type("Handler", (_Handler,), {"owner": self})
        )
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()
        return self

    def hold_until_together(self, count: int) -> None:
        """Answer no request from now on until `count` are in flight at once."""
        with self.lock:
            self.most_in_flight = self.in_flight
            self._awaited = count
            self._came_together.clear()

    def stop(self) -> None:
        """Die: stop listening and cut every connection."""
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()
        self._thread.join()

    def reply(self, asked: Asked) -> Answer:
        """What becomes of a request."""
        with self.lock:
            self.asked.append(asked)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            if self.most_in_flight >= self._awaited:
                self._came_together.set()
        self._came_together.wait()
        try:
            if self.key is not None and asked.headers.get("Authorization") != f"Bearer {self.key}":
                return Answer(401, {"error": "Unauthorized"})
            return self.listing(asked.path) if asked.body is None else self.posted(asked)
        finally:
            with self.lock:
                self.in_flight -= 1

    def listing(self, path: str) -> Answer:
        """The reply to a GET."""
        return (
            Answer(body={"object": "list", "data": [{"id": name} for name in self.models]})
            if path == "/v1/models"
            else NOT_FOUND
        )

    def posted(self, asked: Asked) -> Answer:
        """The reply to a POST."""
        assert asked.body is not None
        return self.or_fault(asked, self.answer(asked.body))

    def or_fault(self, asked: Asked, right: Answer) -> Answer:
        """The right answer, or what the next fault makes of it."""
        with self.lock:
            fault = self.forever or (self.faults.popleft() if self.faults else None)
        return fault(asked, right) if fault else right


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    owner: FaultyServer

    def setup(self) -> None:
        super().setup()
        with self.owner.lock:
            self.owner.connections.add(self.connection)  # so that a stop can cut it

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client gave up, or was killed
            super().handle()

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # the client was killed
            self.close_connection = True
            return
        self._reply(json.loads(data))

    def _reply(self, body: Body | None) -> None:
        answer = self.owner.reply(
            Asked(self.path, httpx.Headers(dict(self.headers)), body, time.monotonic())
        )
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif answer.drip_s:
            self._drip(data, answer.drip_s)
        else:
            self.wfile.write(data)

    def _drip(self, data: bytes, gap_s: float) -> None:
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.owner.stopped.wait(gap_s):
                return

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(
    answer: Callable[[Body], Answer], models: Sequence[str] = ("teacher",), port: int = 0
) -> Iterator[tuple[FaultyServer, str]]:
    """A `FaultyServer` and its base URL, on a free port unless one is given."""
    server = FaultyServer(answer, models, port=port).start()
    try:
        yield server, server.base_url
    finally:
        server.stop()
