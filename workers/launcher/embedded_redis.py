"""The Redis that `onstream up` starts when none is configured.

Its data is in the run directory, and it ends with the launcher.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ConnectionError
from redis.retry import Retry

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import EMBEDDED_ADDRESS
from onstream.workers.launcher.redis_binary import find_server, server_version

START_TIMEOUT_S = 60.0  # reading a large append-only file back takes a while
LOCK_TIMEOUT_S = 10.0
SOCKET_PATH_BYTES = 100  # the kernel's limit is 107
PR_SET_PDEATHSIG = 1


class EmbeddedRedis:
    """One server process on the data in `data`.

    After a crash, `start` serves the same data at the same address again.

    Start it from the main thread: the kernel ends the server with the thread that started it.
    """

    def __init__(self, data: Path, *, max_memory_mb: int, server_bin: Path | None = None) -> None:
        self.data = data
        self.max_memory_mb = max_memory_mb
        self.server = find_server(server_bin)
        self._home: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server listens, the same for all its lives."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it lives."""
        return self._process.pid if self._process is not None and self.alive else None

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start the server and wait until it answers; returns its URL.

        Raises:
            UserError: another server has the data, a newer one wrote it, or the server does not
                come up.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        self._refuse_downgrade()
        with (
            (self.data / "lock").open("a+") as lock,
            (self.data / "server.log").open("ab") as output,
        ):
            self._take(lock)
            self._process = subprocess.Popen(
                self._arguments(),
                stdout=output,
                stderr=output,
                pass_fds=[lock.fileno()],
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._wait_until_up()
        address = self.data / EMBEDDED_ADDRESS.name
        if not address.exists() or address.read_text() != self.url:  # the disk may be full by now
            address.write_text(self.url)
        return self.url

    def stop(self) -> None:
        """End the server; what it acknowledged is on disk."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            (self.data / EMBEDDED_ADDRESS.name).unlink(missing_ok=True)
        if self._home is not None:
            shutil.rmtree(self._home)
            self._home = None

    @property
    def _socket(self) -> Path:
        if self._home is None:
            inside = tempfile.gettempdir()
            short = len(os.fsencode(inside)) <= SOCKET_PATH_BYTES - len("/onstream-12345678/s.sock")
            self._home = Path(tempfile.mkdtemp(prefix="onstream-", dir=inside if short else "/tmp"))
        return self._home / "s.sock"

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.data.resolve()),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "auto-aof-rewrite-min-size": "1gb",
            "maxmemory": f"{self.max_memory_mb}mb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [
            str(self.server),
            *(part for name, value in options.items() for part in (f"--{name}", value)),
        ]

    def _take(self, lock: IO[str]) -> None:
        """Lock the data. The server inherits the open file, and with it the lock."""
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another Redis still runs on {self.data}",
                        expected="data that no other server uses",
                        next_step="Stop the other `onstream up` of this run, or choose another "
                        "run.name.",
                    ) from error
                # The server of a launcher that was just killed is about to end.
                time.sleep(0.02)

    def _refuse_downgrade(self) -> None:
        stamp = self.data / "version"
        ours = server_version(self.server)
        if stamp.exists() and _release(stamp.read_text()) > _release(ours):
            theirs = stamp.read_text()
            raise UserError(
                f"{self.data} was written by Redis {theirs}, and {self.server} is {ours}",
                expected=f"Redis {theirs} or newer, since an older one cannot read it",
                next_step="Set redis.server_bin to the newer server, or choose another run.name.",
            )
        if not stamp.exists() or stamp.read_text() != ours:
            stamp.write_text(ours)

    def _wait_until_up(self) -> None:
        client = Redis(
            unix_socket_path=str(self._socket), socket_timeout=5, retry=Retry(NoBackoff(), 0)
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while self.alive and time.monotonic() < deadline:
                try:
                    client.ping()
                    return
                except (BusyLoadingError, ConnectionError):
                    time.sleep(0.005)
        finally:
            client.close()
        log = self.data / "server.log"
        last = " / ".join(log.read_text(errors="replace").splitlines()[-3:])
        raise UserError(
            f"the embedded Redis did not come up: {last or 'it wrote nothing'}",
            expected="a server that answers",
            next_step=f"Read {log}, or set redis.url to a running Redis.",
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _die_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
