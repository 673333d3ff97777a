"""A vLLM server as the launcher sees it: an address of its own, and whether it is healthy."""

from __future__ import annotations

import http.client
import socket
import time
from pathlib import Path

from onstream.workers.launcher.polling import PollingThread

HOST = "127.0.0.1"
POLL_S = 0.25
ANSWER_S = 5.0


class ModelServer:
    """Where the server `name` listens, also after a restart, and whether it is healthy.

    `kind` says what it serves, for the launcher; `log` is its log.
    """

    def __init__(self, name: str, kind: str, log: Path) -> None:
        self.name = name
        self.kind = kind
        self._log = log
        self._reserved = _reserve()
        self.port: int = self._reserved.getsockname()[1]
        self.base_url = f"http://{HOST}:{self.port}/v1"
        self.healthy = False
        self.has_served = False
        self._told = False
        self._since = time.monotonic()
        self._polling = PollingThread(f"{name}-health", POLL_S, self._look)

    def start(self) -> None:
        """Start to ask."""
        self._polling.start()

    def stop(self) -> None:
        """Stop to ask, and let go of the port."""
        self._polling.stop()
        self._reserved.close()

    def news(self) -> str:
        """What has changed since the last call, in a sentence; nothing if nothing has."""
        if self.healthy == self._told:
            return ""
        self._told = self.healthy
        seconds = time.monotonic() - self._since
        self._since = time.monotonic()
        if not self._told:
            return f"{self.name}: no longer healthy (its log: {self._log})"
        return (
            f"{self.name}: healthy at {self.base_url} after {seconds:.0f} s (its log: {self._log})"
        )

    def waits(self) -> list[str]:
        """What a run that needs the server waits for, in words."""
        if self.healthy:
            return []
        state = "not healthy" if self.has_served else "loading its model"
        return [f"{self.name}: {state} (its log: {self._log})"]

    def _look(self) -> None:
        self.healthy = self._answers()
        self.has_served = self.has_served or self.healthy

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

    The system then gives the port to nobody else; the server, which may come tens of seconds later
    and again after a death, shares it because it allows the reuse of its address as this socket
    does.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind((HOST, 0))
    return reserved
