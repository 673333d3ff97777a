"""The life of one scoring child: read jobs, score them one after the other, say what became of
each.
"""

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
from onstream.workers.verifier.scorer_messages import Frames, ScoringRequest, Verdict, framed

MAX_REASON_CHARACTERS = 500
_PR_SET_PDEATHSIG = 1

_encode = msgspec.msgpack.Encoder().encode
_decode_jobs = msgspec.msgpack.Decoder(list[ScoringRequest]).decode


def serve(connection: socket.socket, scorer: Scorer, max_memory_bytes: int) -> None:
    """Serve `connection` until its other end is closed. The first frame, an empty one, says that
    the child is up.
    """
    _confine(max_memory_bytes)
    connection.sendall(framed(b""))
    pid = os.getpid()
    frames = Frames(max_bytes=2**32)
    while data := connection.recv(1 << 18):
        for frame in frames.feed(data):
            for job in _decode_jobs(frame):
                verdict = score_completion(scorer, job)
                if (
                    os.getpid() != pid
                ):  # the scorer forked, and this is its copy, coming back as well
                    os._exit(0)
                retires = _has_left_processes()
                connection.sendall(
                    framed(
                        _encode(
                            msgspec.structs.replace(verdict, retires=True) if retires else verdict
                        )
                    )
                )
                if retires:
                    return


def score_completion(scorer: Scorer, job: ScoringRequest) -> Verdict:
    """The verdict on one completion; whatever the scorer raises becomes one."""
    try:
        reward, parts = read_score(scorer(job.completion, job.info))
        return Verdict(reward, parts)
    except RolloutError:
        return Verdict(0.0, {"rollout_error": 1.0})
    # sys.exit() and the like in a scorer are its failures too, and must not end the child
    except BaseException as error:
        return Verdict(unscored=_reason(error))


def _reason(error: BaseException) -> str:
    """The error and where it came from, on one short line that always encodes."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an exception of the user's own whose text fails
        text = type(error).__name__
    return text.encode(errors="replace").decode()[:MAX_REASON_CHARACTERS] + place


def _has_left_processes() -> bool:
    """Whether the scorer has started processes that are still there, or that it never waited for."""
    try:
        os.waitpid(-1, os.WNOHANG)
        return True
    except ChildProcessError:
        return False


def _confine(max_memory_bytes: int) -> None:
    """Make this process one that can be killed, cannot outlive its parent, and disturbs nobody."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit_memory(max_memory_bytes)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (
        0,
        1,
        2,
    ):  # what a scorer prints is of no use to anybody, and must not fill a pipe or the log
        os.dup2(nowhere, standard)
    os.close(nowhere)


def _limit_memory(max_memory_bytes: int) -> None:
    """Allow so much beyond what is mapped by now, and offer this process first when the machine's
    memory runs out.
    """
    with open("/proc/self/statm") as sizes:
        limit_bytes = int(sizes.read().split()[0]) * resource.getpagesize() + max_memory_bytes
    _, most_bytes = resource.getrlimit(resource.RLIMIT_AS)
    if most_bytes == resource.RLIM_INFINITY or limit_bytes < most_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    with (
        contextlib.suppress(OSError),
        open("/proc/self/oom_score_adj", "w") as score,
    ):  # some sandboxes forbid it
        score.write("1000")
