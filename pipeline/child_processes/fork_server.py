"""The single-threaded process that a worker's children are forked from.

A fork of this process takes a few milliseconds. The worker itself has threads and must not fork.
`onstream.pipeline.child_processes.fork_server_client` runs it as
`python -P -m onstream.pipeline.child_processes.fork_server FD`, where FD is its end of a packet
socket. When the other end is closed, for whatever reason, it kills every child and ends.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import traceback

import msgspec

from onstream.pipeline.child_processes import child
from onstream.pipeline.child_processes.child import ChildWork
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
from onstream.pipeline.import_path import import_function
from onstream.pipeline.processes import kill_group


class ForkServer:
    """Forks and kills children as the worker says, and reports those that have ended.

    Consumes messages on `control` and the ends of its children; waits for either; is unblocked by
    both, and by the worker's end of `control` closing; produces one `ChildExited` a child.
    """

    def __init__(self, control: socket.socket, work: ChildWork, max_memory_bytes: int) -> None:
        self._control = control
        self._work = work
        self._max_memory_bytes = max_memory_bytes
        self._slots: dict[int, int] = {}  # pid -> slot
        self._decode = msgspec.msgpack.Decoder(Spawn | Kill).decode
        # A signal that comes between looking for dead children and `select` would go unseen. Its
        # byte in this pipe makes `select` return.
        self._wake_up, self._wake_up_end = os.pipe()
        os.set_blocking(self._wake_up, False)
        os.set_blocking(self._wake_up_end, False)

    def run(self) -> None:
        """Serve until the worker is gone."""
        signal.set_wakeup_fd(self._wake_up_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            while self._serve():
                self._reap()
        finally:
            for pid in self._slots:
                kill_group(pid)

    def _serve(self) -> bool:
        """Wait for a message or a signal; act on a message. False when the worker is gone."""
        readable, _, _ = select.select([self._control.fileno(), self._wake_up], [], [])
        if self._wake_up in readable:
            os.read(self._wake_up, 4096)
        if self._control.fileno() not in readable:
            return True
        packet, descriptors, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1)
        if not packet:
            return False
        match self._decode(packet):
            case Spawn(slot):
                self._spawn(slot, socket.socket(fileno=descriptors[0]))
            case Kill(slot):
                self._kill(slot)
        return True

    def _spawn(self, slot: int, connection: socket.socket) -> None:
        with connection:
            connection.set_inheritable(False)
            pid = os.fork()
            if not pid:
                self._become_child(connection)
            self._slots[pid] = slot
            try:
                # The child does so too. Whoever comes first, it leads a group before it can be
                # killed as one.
                os.setpgid(pid, pid)
            except ProcessLookupError:
                return  # it has ended already; `_reap` will find it

    def _kill(self, slot: int) -> None:
        for pid, its_slot in self._slots.items():
            if its_slot == slot:
                kill_group(pid)

    def _become_child(self, connection: socket.socket) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            os.close(self._wake_up)
            os.close(self._wake_up_end)
            child.serve(connection, self._work, self._max_memory_bytes)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _reap(self) -> None:
        while self._slots and (
            ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ):
            # What the child left behind is killed before the child is reaped: until then the number
            # of its group belongs to nobody else.
            kill_group(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            slot = self._slots.pop(ended.si_pid, None)
            if slot is not None:
                exited = ChildExited(slot, os.waitstatus_to_exitcode(status))
                self._control.send(msgspec.msgpack.encode(exited))


def main() -> None:
    """Load the work, say so, and serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    start = msgspec.msgpack.decode(control.recv(PACKET_BYTES), type=Start)
    try:
        work: ChildWork = import_function(start.loader, setting=start.what)(start.settings)
    except UserError as error:
        not_loaded = NotLoaded(error.got, error.expected, error.next_step)
        control.send(msgspec.msgpack.encode(not_loaded))
        return
    control.send(msgspec.msgpack.encode(Ready()))
    gc.freeze()  # the children's collectors leave what they share alone, so that it stays shared
    try:
        ForkServer(control, work, start.max_memory_bytes).run()
    except (BrokenPipeError, ConnectionResetError):
        return  # the worker ended between two messages; `run` has killed the children


if __name__ == "__main__":
    main()
