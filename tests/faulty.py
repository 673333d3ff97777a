"""A real HTTP server on this machine that answers as it is told to: for faults that no real model server gives on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Answer:
    """A reply. `cut` breaks the connection half-way; `drip_s` sends it slowly, a byte at a time."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    drip_s: float = 0.0


@dataclass
class Asked:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: Body | None
    at: float


class Server:
    """Answers every POST by `answer`, which may be replaced at any time, and `GET /v1/models` with `models`."""

    def __init__(self, answer: Callable[[Body], Answer], models: list[str]) -> None:
        self.answer, self.models = answer, models
        self.asked: list[Asked] = []
        self.now = 0  # requests being answered
        self.most = 0
        self._lock = threading.Lock()

    @property
    def bodies(self) -> list[Body]:
        """What was posted so far, in order."""
        return [asked.body for asked in self.asked if asked.body is not None]

    def reply(self, path: str, headers: dict[str, str], body: Body | None) -> Answer:
        with self._lock:
            self.asked.append(Asked(path, headers, body, time.monotonic()))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if body is None:
                return Answer(body={"object": "list", "data": [{"id": name} for name in self.models]})
            return self.answer(body)
        finally:
            with self._lock:
                self.now -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

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
        answer = self.owner.reply(self.path, dict(self.headers), body)
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self._send(answer, data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up, as it should

    def _send(self, answer: Answer, data: bytes) -> None:
        if answer.cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif answer.drip_s:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(answer.drip_s)
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(answer: Callable[[Body], Answer], models: list[str] | None = None, port: int = 0) -> Iterator[tuple[Server, str]]:
    """A `Server` and its base URL, on a free port unless one is given."""
    server = Server(answer, models or ["teacher"])
    handler = type("Handler", (_Handler,), {"owner": server})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{http.server_address[1]}/v1"
        finally:
            http.shutdown()
            thread.join()
