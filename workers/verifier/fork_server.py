"""The process that scoring children are forked from: single-threaded, with the scorer imported
once.

A fork of this takes some milliseconds, whereas the verifier itself has threads, and must not fork.
Run by `onstream.workers.verifier.scorer_pool` as `python -m onstream.workers.verifier.fork_server
FD`, FD being its end of a packet socket. It ends, and kills every child, when the other end is
closed, whatever became of the verifier.
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

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import Scorer, load_scorer
from onstream.settings.root import Settings
from onstream.workers.verifier import scorer_process
from onstream.workers.verifier.scorer_messages import (
    PACKET_BYTES,
    Kill,
    Ready,
    ScorerExited,
    ScorerNotLoaded,
    Spawn,
    Start,
)


class ForkServer:
    """Forks and kills children as the verifier says, and says which have ended.

    Waits for a message or the end of a child; the verifier's end of `control` closing ends it.
    """

    def __init__(self, control: socket.socket, scorer: Scorer, max_memory_bytes: int) -> None:
        self._control = control
        self._scorer = scorer
        self._max_memory_bytes = max_memory_bytes
        self._slots: dict[int, int] = {}  # pid -> slot
        self._decode = msgspec.msgpack.Decoder(Spawn | Kill).decode
        self._wake_up, self._wake_up_end = os.pipe()
        for end in (self._wake_up, self._wake_up_end):
            os.set_blocking(end, False)

    def run(self) -> None:
        """Serve until the verifier is gone."""
        signal.set_wakeup_fd(self._wake_up_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            while self._serve():
                self._reap()
        finally:
            for pid in self._slots:
                _kill_group(pid)

    def _serve(self) -> bool:
        """Wait for something to do; do it if it is a message. False when the verifier is gone."""
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
                for pid in [pid for pid, taken in self._slots.items() if taken == slot]:
                    _kill_group(pid)
        return True

    def _spawn(self, slot: int, connection: socket.socket) -> None:
        with connection:
            connection.set_inheritable(False)
            pid = os.fork()
            if not pid:
                self._become_child(connection)
            self._slots[pid] = slot
            try:
                os.setpgid(
                    pid, pid
                )  # the child does so too; whoever comes first, it is a group before it can be killed
            except ProcessLookupError:
                return  # it has ended already, as `_reap` will find

    def _become_child(self, connection: socket.socket) -> None:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            os.close(self._wake_up)
            os.close(self._wake_up_end)
            scorer_process.serve(connection, self._scorer, self._max_memory_bytes)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _reap(self) -> None:
        while self._slots and (
            ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ):
            # What the child left behind is killed before it is reaped: until then its group's
            # number is nobody else's.
            _kill_group(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if (slot := self._slots.pop(ended.si_pid, None)) is not None:
                self._control.send(
                    msgspec.msgpack.encode(ScorerExited(slot, os.waitstatus_to_exitcode(status)))
                )


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it had become no group yet, or all of it is gone


def main() -> None:
    """Load the scorer, say so, and serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    start = msgspec.msgpack.decode(control.recv(PACKET_BYTES), type=Start)
    try:
        scorer = load_scorer(Settings.model_validate_json(start.settings))
    except UserError as error:
        control.send(
            msgspec.msgpack.encode(ScorerNotLoaded(error.got, error.expected, error.next_step))
        )
        return
    control.send(msgspec.msgpack.encode(Ready()))
    gc.freeze()  # the children's collectors leave what they share alone, and it stays shared
    try:
        ForkServer(control, scorer, start.max_memory_bytes).run()
    except (BrokenPipeError, ConnectionResetError):
        return  # the verifier ended between two messages; `run` has killed the children


if __name__ == "__main__":
    main()
