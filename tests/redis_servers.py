"""A Redis with a replica, at one address that can be made to mean either; and a way to kill one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis

from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.redis_binary import find_server


class Server:
    """One redis-server, over TCP (replication knows nothing else) and a Unix socket."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.socket = directory / "s.sock"
        self.port = free_port()
        listens = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--unixsocket",
            str(self.socket),
            "--dir",
            str(directory),
        ]
        command = [
            str(find_server(None)),
            *listens,
            "--save",
            "",
            "--maxmemory-policy",
            "noeviction",
            "--repl-diskless-sync-delay",
            "0",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = Redis(unix_socket_path=str(self.socket), socket_timeout=5)
        while not self.socket.exists():
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()


class Pair:
    """A server and its replica. `url` means the server until `fail_over`, and then the replica."""

    def __init__(self, directory: Path) -> None:
        self.main = Server(directory / "main")
        self.replica = Server(directory / "replica")
        self._address = directory / "address.sock"
        self._address.symlink_to(self.main.socket)
        self.url = f"unix://{self._address}"
        self.replica.client.execute_command("REPLICAOF", "127.0.0.1", self.main.port)
        while self.replica.client.info("replication")["master_link_status"] != "up":
            time.sleep(0.02)

    def cut_off_replica(self) -> None:
        """From now on the replica gets nothing: what is written now, a fail-over loses."""
        self.main.client.execute_command("WAIT", 1, 5000)
        self.replica.client.execute_command("REPLICAOF", "NO", "ONE")

    def fail_over(self) -> None:
        """The server dies, and the replica takes its address."""
        self.main.kill()
        self._point_to(self.replica)

    def swap(self) -> None:
        """The two change places, both alive; who is connected to the server is connected to a
        replica now, which takes no writes.
        """
        self.cut_off_replica()
        self.main.client.execute_command("REPLICAOF", "127.0.0.1", self.replica.port)
        self._point_to(self.replica)

    def _point_to(self, server: Server) -> None:
        self._address.unlink()
        self._address.symlink_to(server.socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in (self.main, self.replica):
            server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill(server: EmbeddedRedis) -> None:
    """Kill `server`, and wait until it is gone."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.001)
