"""Runs a module as a program that dies with the process that started it: `python -m
onstream.workers.launcher.die_with_parent PID MODULE [ARGS…]`.

Linux only has a signal for this (PR_SET_PDEATHSIG), and the child has to ask for it. It is asked
for here rather than between fork and exec, where the launcher's other threads would make any Python
code unsafe. SIGKILL, and not a drain: the embedded Redis goes at the same moment, and every record
is safe against a kill.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie_to(parent_pid: int) -> bool:
    """Have this process killed when its parent dies; False when the parent is no longer
    `parent_pid`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent_pid


def guard_group() -> None:
    """Leave a process behind in this one's process group that kills the whole group as soon as this
    process has ended, in whatever way.

    For a program whose own child processes would outlive its kill, and keep their memory and ports.
    Call it while this process has no thread but the first. Only on Linux; elsewhere the launcher
    alone ends what is left, and only while it lives itself.
    """
    if sys.platform != "linux" or os.getpgrp() != os.getpid():
        return
    guarded = os.getpid()
    if os.fork():
        return
    ended = (signal.SIGTERM, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    while os.getppid() == guarded:  # a SIGTERM to the group lets the others end by themselves
        signal.sigwait(ended)
    os.killpg(guarded, signal.SIGKILL)  # this process is of the group too


def main() -> None:
    """Run the module named in the arguments, unless the parent is already gone."""
    parent_pid, module, *arguments = sys.argv[1:]
    if not tie_to(int(parent_pid)):
        return
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
