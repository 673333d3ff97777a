"""The teacher's server as the launcher sees it: an address that nothing else can take, and whether something healthy serves there."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from pathlib import Path

TEACHER_SERVER = "teacher-server"
HOST = "127.0.0.1"
POLL_S = 0.25
ANSWER_S = 5.0
LEAVE_S = 2.0


class TeacherServer:
    """Where the server listens in all its lives, and its health, asked for every quarter of a second.

    Consumes replies of `/health`; waits for them and its interval, in a thread of its own, since a server that hangs must not stop
    the supervision of the workers; is unblocked by `stop`; produces `healthy`.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._reserved = _reserve()
        self.port: int = self._reserved.getsockname()[1]
        self.base_url = f"http://{HOST}:{self.port}/v1"
        self.healthy = self.has_served = False
        self._told = False
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teacher-server-health", daemon=True)

    def start(self) -> None:
        """Start to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to ask, and let go of the port."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(LEAVE_S)
        self._reserved.close()

    def news(self) -> str:
        """What has changed since the last call, in a sentence; nothing if nothing has."""
        if self.healthy == self._told:
            return ""
        self._told, seconds = self.healthy, time.monotonic() - self._since
        self._since = time.monotonic()
        if self.healthy:
            return f"{TEACHER_SERVER}: healthy at {self.base_url} after {seconds:.0f} s (its log: {self._log})"
        return f"{TEACHER_SERVER}: no longer healthy (its log: {self._log})"

    def waits(self) -> list[str]:
        """What a run that needs the server waits for, in words."""
        if self.healthy:
            return []
        return [f"{TEACHER_SERVER}: {'not healthy' if self.has_served else 'loading its model'} (its log: {self._log})"]

    def overrides(self, teacher: str, max_in_flight: int) -> list[str]:
        """What makes a `teacher-external` worker ask this server alone, by its fastest protocol and without the budgets of paid ones."""
        client = {
            "base_url": json.dumps([self.base_url]),
            "max_in_flight": max_in_flight,
            "protocol": "vllm-generate",
            "skip_model_check": "false",
            "requests_per_second": "null",
            "max_tokens_per_run": "null",
        }
        section = "orchestrator.teacher_model"
        return [f"{section}.model.name={teacher}", *(f"{section}.client.{name}={value}" for name, value in client.items())]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.healthy = self._answers()
            self.has_served = self.has_served or self.healthy
            self._stop.wait(POLL_S)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _reserve() -> socket.socket:
    """A socket that is bound to a free port and never listens.

    The system then gives the port to nobody else; the server, which may come tens of seconds later and again after a death, shares it
    because it allows the reuse of its address as this socket does.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind((HOST, 0))
    return reserved
