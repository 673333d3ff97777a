"""A child process: it reads requests, answers one after the other, and sends the replies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from onstream.pipeline.child_processes.messages import LENGTH, Reply

_PR_SET_PDEATHSIG = 1

_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True)
class ChildWork:
    """What a child does: `answer` returns a reply to each request, and never raises.

    `decode` reads the requests of one frame.
    """

    decode: Callable[[bytes], Sequence[Any]]
    answer: Callable[[Any], Reply]


def serve(connection: socket.socket, work: ChildWork, max_memory_bytes: int) -> None:
    """Serve `connection` until its other end is closed.

    The first frame, an empty one, says that the process is ready.
    """
    _confine(max_memory_bytes)
    _send(connection, b"")
    pid = os.getpid()
    with connection.makefile("rb") as incoming:
        while header := incoming.read(LENGTH.size):
            (length,) = LENGTH.unpack(header)
            for request in work.decode(incoming.read(length)):
                reply = work.answer(request)
                if os.getpid() != pid:
                    os._exit(0)  # the work forked, and this is the copy, which returns as well
                if _has_left_processes():
                    reply = msgspec.structs.replace(reply, retires=True)
                _send(connection, _encode(reply))
                if reply.retires:
                    return


def _send(connection: socket.socket, body: bytes) -> None:
    connection.sendall(LENGTH.pack(len(body)) + body)


def _has_left_processes() -> bool:
    """Whether a process that the work started still runs, or was never waited for."""
    try:
        os.waitpid(-1, os.WNOHANG)
        return True
    except ChildProcessError:
        return False


def _confine(max_memory_bytes: int) -> None:
    """Limit this process: it can be killed as a group, ends with its parent, and prints nowhere."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit_memory(max_memory_bytes)
    # What the work prints must not fill a pipe or the log.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)


def _limit_memory(max_memory_bytes: int) -> None:
    """Allow so much beyond what is mapped by now.

    When the machine's memory runs out, the kernel is to kill this process first.
    """
    with open("/proc/self/statm") as sizes:
        mapped_bytes = int(sizes.read().split()[0]) * resource.getpagesize()
    limit_bytes = mapped_bytes + max_memory_bytes
    _, most_bytes = resource.getrlimit(resource.RLIMIT_AS)
    if most_bytes == resource.RLIM_INFINITY or limit_bytes < most_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    # Some containers forbid it.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
