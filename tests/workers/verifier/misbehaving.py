"""Scorers that do what no scorer should.

`info["do"]` names one, so that a pool meets several among honest ones.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from onstream.pipeline.tasks import RolloutError


def score(completion: str, info: dict[str, Any]) -> Any:
    """1 for a completion that asks for nothing; else what `info["do"]` says."""
    return globals()[info["do"]](info) if "do" in info else 1.0


def loop_forever(info: dict[str, Any]) -> Any:
    while True:
        pass


def ignore_signals(info: dict[str, Any]) -> Any:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1)
        except BaseException:
            continue


def give(info: dict[str, Any]) -> Any:
    return info["give"]


def leave(info: dict[str, Any]) -> Any:
    os._exit(7)


def segfault(info: dict[str, Any]) -> Any:
    ctypes.string_at(0)


def fork_and_return(info: dict[str, Any]) -> Any:
    os.fork()
    return 1.0


def fork_and_stay(info: dict[str, Any]) -> Any:
    pid = os.fork()
    while not pid:
        time.sleep(60)
    return {"reward": 1.0, "pid": pid}


def fork_and_leave(info: dict[str, Any]) -> Any:
    while not os.fork():
        time.sleep(60)
    os._exit(7)


def close_everything(info: dict[str, Any]) -> Any:
    os.closerange(0, 256)
    loop_forever(info)


def write_everywhere(info: dict[str, Any]) -> Any:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue
    return 1.0


def print_much(info: dict[str, Any]) -> Any:
    for _ in range(10):
        print("x" * 2**20)
        sys.stderr.write("y" * 2**20)
    return 1.0


def raise_error(info: dict[str, Any]) -> Any:
    raise KeyError("no such thing")


def raise_unprintable(info: dict[str, Any]) -> Any:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError

    raise Unprintable


def exit_politely(info: dict[str, Any]) -> Any:
    sys.exit("bye")


def blame_the_rollout(info: dict[str, Any]) -> Any:
    raise RolloutError("it divides by zero")


def take_memory(info: dict[str, Any]) -> Any:
    return float(len(bytearray(2**33)))


def return_nan(info: dict[str, Any]) -> Any:
    return float("nan")


def return_none(info: dict[str, Any]) -> Any:
    return None


def return_text(info: dict[str, Any]) -> Any:
    return "1.0"


def nap(info: dict[str, Any]) -> Any:
    time.sleep(info["seconds"])
    return 1.0


def be_killed_once(info: dict[str, Any]) -> Any:
    marker = Path(info["marker"])
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def tell_pid(info: dict[str, Any]) -> Any:
    return {"reward": 1.0, "pid": os.getpid(), "parent": os.getppid()}


def wait_to_be_told(info: dict[str, Any]) -> Any:
    """Says that it has begun, and goes on when it is told to."""
    Path(info["begun"]).touch()
    while not Path(info["go_on"]).exists():
        time.sleep(0.01)
    return 1.0


def take_a_while(info: dict[str, Any]) -> Any:
    """Longer than a verifier's children have where slow rollouts go to jobs."""
    time.sleep(1.3)
    return 1.0
