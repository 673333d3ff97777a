"""A worker's side of its fork server: starts it, and has it fork and kill children."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import msgspec

from onstream.pipeline.child_processes.messages import (
    PACKET_BYTES,
    ChildExited,
    Kill,
    NotLoaded,
    Ready,
    Spawn,
    Start,
)
from onstream.pipeline.errors import UserError

START_S = 120.0
END_S = 5.0

_encode = msgspec.msgpack.Encoder().encode


class ForkServerClient:
    """A running fork server. `close` it."""

    def __init__(self, start: Start) -> None:
        """Start it and wait until it has loaded its work.

        Raises:
            UserError: the work cannot be loaded.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start_process(theirs)
        self._control.send(_encode(start))
        reply = self._first_reply(start.what)
        if isinstance(reply, NotLoaded):
            self.close()
            raise UserError(reply.got, expected=reply.expected, next_step=reply.next_step)

    @property
    def pid(self) -> int:
        """The fork server's process id."""
        return self._process.pid

    def fileno(self) -> int:
        """What becomes readable when a child has ended, or the fork server itself."""
        return self._control.fileno()

    def spawn(self, slot: int) -> socket.socket:
        """Have the process of `slot` forked; returns the socket to speak to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [_encode(Spawn(slot))], [theirs.fileno()])
        ours.setblocking(False)
        return ours

    def kill(self, slot: int) -> None:
        """Have the process of `slot` killed, with all it has started."""
        self._control.send(_encode(Kill(slot)))

    def next_exit(self) -> ChildExited:
        """The next child that has ended.

        Raises:
            RuntimeError: the fork server itself has ended.
        """
        packet = self._control.recv(PACKET_BYTES)
        if not packet:
            status = self._process.wait()
            raise RuntimeError(
                f"the process that children are forked from has ended, with status {status}"
            )
        return msgspec.msgpack.decode(packet, type=ChildExited)

    def close(self) -> None:
        """End the fork server, which kills its children."""
        self._control.close()
        try:
            self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _first_reply(self, what: str) -> Ready | NotLoaded:
        self._control.settimeout(START_S)
        try:
            reply = self._control.recv(PACKET_BYTES)
        except ConnectionResetError:
            reply = b""
        except TimeoutError:
            return NotLoaded(
                f"the {what} was not imported in {START_S:.0f} s",
                "a quick import",
                "Look at its module's top level.",
            )
        self._control.settimeout(None)
        if not reply:
            return NotLoaded(
                f"the process ended while importing the {what}",
                f"an importable {what}",
                "See the lines above.",
            )
        return msgspec.msgpack.decode(reply, type=Ready | NotLoaded)


def _start_process(control: socket.socket) -> subprocess.Popen[bytes]:
    """The process, with `control` as its end of the socket.

    `-P` and our own search path: it imports what this process imports, and the user's directory
    comes last there too.
    """
    module = "onstream.pipeline.child_processes.fork_server"
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(control.fileno())],
        pass_fds=[control.fileno()],
        env={**os.environ, "PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the worker's to act on
    )
