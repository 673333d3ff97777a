"""Runs a module as a program that dies with the process that started it.

`python -m onstream.workers.launcher.die_with_parent PID MODULE [ARGS…]`

Only Linux has a signal for this (PR_SET_PDEATHSIG), and the child has to ask for it. It asks here
and not between fork and exec, where the launcher's other threads make any Python code unsafe. The
signal is SIGKILL and not one that drains: the embedded Redis ends at the same moment, and a kill
loses no record.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie_to(parent_pid: int) -> bool:
    """Have this process killed when its parent dies.

    False when the parent is no longer `parent_pid`: it died before.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent_pid


def guard_group() -> None:
    """Fork a process that kills this one's whole process group as soon as this one has ended.

    For a program whose own child processes would outlive its kill, and keep their memory and ports.
    Call it while this process has no thread but the first. Only on Linux; elsewhere nothing but a
    launcher that is still alive ends what is left.
    """
    if sys.platform != "linux" or os.getpgrp() != os.getpid():
        return
    guarded = os.getpid()
    if os.fork():
        return
    ended = (signal.SIGTERM, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    # A SIGTERM to the group is ignored here: the others end by themselves.
    while os.getppid() == guarded:
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
