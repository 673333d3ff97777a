"""A scorer process: it reads requests, scores them one after the other, and sends the verdicts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import traceback

import msgspec

from onstream.pipeline.tasks.scorers import RolloutError, Scorer, read_score
from onstream.workers.verifier.scorer_messages import LENGTH, ScoringRequest, Verdict

MAX_REASON_CHARACTERS = 500
_PR_SET_PDEATHSIG = 1

_encode = msgspec.msgpack.Encoder().encode
_decode_requests = msgspec.msgpack.Decoder(list[ScoringRequest]).decode


def serve(connection: socket.socket, scorer: Scorer, max_memory_bytes: int) -> None:
    """Serve `connection` until its other end is closed.

    The first frame, an empty one, says that the process is ready.
    """
    _confine(max_memory_bytes)
    _send(connection, b"")
    pid = os.getpid()
    with connection.makefile("rb") as incoming:
        while header := incoming.read(LENGTH.size):
            (length,) = LENGTH.unpack(header)
            for request in _decode_requests(incoming.read(length)):
                verdict = score_completion(scorer, request)
                if os.getpid() != pid:
                    os._exit(0)  # the scorer forked, and this is the copy, which returns as well
                if _has_left_processes():
                    verdict = msgspec.structs.replace(verdict, retires=True)
                _send(connection, _encode(verdict))
                if verdict.retires:
                    return


def _send(connection: socket.socket, body: bytes) -> None:
    connection.sendall(LENGTH.pack(len(body)) + body)


def score_completion(scorer: Scorer, request: ScoringRequest) -> Verdict:
    """The verdict on one completion. Whatever the scorer raises becomes a verdict too."""
    try:
        reward, parts = read_score(scorer(request.completion, request.info))
        return Verdict(reward, parts)
    except RolloutError:
        return Verdict(0.0, {"rollout_error": 1.0})
    # sys.exit() and the like in a scorer are its failures too, and must not end the process
    except BaseException as error:
        return Verdict(unscored=_reason(error, scorer))


def _reason(error: BaseException, scorer: Scorer) -> str:
    """The error and where it came from, on one short line that always encodes."""
    place = _place(error, scorer)
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an exception of the user's own whose text fails
        text = type(error).__name__
    return text.encode(errors="replace").decode()[:MAX_REASON_CHARACTERS] + place


def _place(error: BaseException, scorer: Scorer) -> str:
    """The file and line of `error`; those of the scorer itself where the call of it failed."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename != __file__:
        return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    code = getattr(scorer, "__code__", None)
    return f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code else ""


def _has_left_processes() -> bool:
    """Whether a process that the scorer started still runs, or was never waited for."""
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
    # What a scorer prints must not fill a pipe or the log.
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
