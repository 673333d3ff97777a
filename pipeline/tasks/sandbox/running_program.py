"""A program that runs in a jail: what it writes, how it ends, and the end of all it started."""

from __future__ import annotations

import ast
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from onstream.pipeline.processes import kill_group

END_S = 5.0
ALL_GONE = b"{'gone': True}\n"
"""What is noted where the jail ended without a last message."""

Failure = Literal["timed_out", "output_limit", "cpu_limit", "memory_limit", "killed", "failed"]


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended: its output, and its failure if there was one, which `message` explains.

    `isolation` names the means of REQUIRED and OPTIONAL that were in force.
    """

    output: bytes
    failure: Failure | None
    message: str = ""
    isolation: tuple[str, ...] = ()


class SandboxError(RuntimeError):
    """The sandbox itself failed. Nothing is known of the program."""


class RunningProgram:
    """A program in its jail. To leave it as a context ends all that it started.

    `output` is what it has written so far. `ended_itself` says, after the end of the context,
    whether it was over before.
    """

    def __init__(
        self,
        jail: subprocess.Popen[bytes],
        status: int,
        scratch: str,
        user: int,
        max_output_bytes: int,
    ) -> None:
        assert jail.stdout is not None
        self._jail = jail
        self._stdout = jail.stdout
        self._status = status
        self._scratch = scratch
        self._user = user
        self._max_output_bytes = max_output_bytes
        self._message = b""
        self.ended_itself = False
        self.output = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended_itself = self.is_over
        try:
            self._end()
        finally:
            os.close(self._status)
            self._stdout.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def is_over(self) -> bool:
        """Whether it ended, or wrote more than it may."""
        return self._has_ended or len(self.output) > self._max_output_bytes

    def descriptors(self) -> list[int]:
        """What becomes readable when there is something to `read`."""
        return [self._status, self._stdout.fileno()]

    def read(self, descriptor: int) -> bool:
        """Read from one of `descriptors`. False where that one has no more."""
        data = os.read(descriptor, 1 << 16)
        if descriptor == self._status:
            self._message += data or ALL_GONE
        else:
            self.output += data
        return bool(data)

    def result(self, wall_s: float) -> ProgramResult:
        """How it ended, after the end of the context.

        Raises:
            SandboxError: it was not started.
        """
        fields = self._fields
        if "error" in fields:
            raise SandboxError(f"the sandbox could not start a program: {fields['error']}")
        isolation = tuple(fields.get("isolation", ()))
        if os.geteuid() == 0 or "processes" in isolation:
            isolation = (*isolation, "kill")
        if "filter" in fields:
            isolation = (*isolation, "calls")
        output = bytes(self.output)
        most = self._max_output_bytes
        if len(output) > most:
            message = f"it wrote more than {most} bytes"
            return ProgramResult(output[:most], "output_limit", message, isolation)
        if "over_memory" in fields:
            message = f"all its processes together took {fields['over_memory']} bytes of memory"
            return ProgramResult(output, "memory_limit", message, isolation)
        if "gone" in fields:
            message = "all of it was killed, perhaps for want of memory"
            return ProgramResult(output, "killed", message, isolation)
        if "code" not in fields:
            message = f"it ran longer than {wall_s:g} s"
            return ProgramResult(output, "timed_out", message, isolation)
        return ProgramResult(output, *_ending(fields["code"]), isolation)

    @property
    def _fields(self) -> dict[str, Any]:
        """The jail's status: its isolation, then how the program ended or what stopped it."""
        lines = self._message.split(b"\n")[:-1]
        return {
            name: value for line in lines for name, value in ast.literal_eval(line.decode()).items()
        }

    @property
    def _has_ended(self) -> bool:
        return not {"code", "error", "over_memory", "gone"}.isdisjoint(self._fields)

    def _end(self) -> None:
        """Kill all that was started, then read what was written before.

        In a process namespace of its own, the kernel kills it with its first process; elsewhere it
        is found by its user.
        """
        kill_group(self._jail.pid)
        self._jail.wait(END_S)
        if os.geteuid() == 0 and "processes" not in self._fields.get("isolation", ()):
            _kill_user(self._user)
        if self._has_ended:
            self._drain()

    def _drain(self) -> None:
        """Read what was written before the end. All processes that could write are gone."""
        os.set_blocking(self._stdout.fileno(), False)
        try:
            while len(self.output) <= self._max_output_bytes and self.read(self._stdout.fileno()):
                continue
        except BlockingIOError:
            return


def watch(
    programs: Sequence[RunningProgram],
    deadline: float,
    *,
    also: int | None = None,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Read what `programs` write until one of them is over, or `deadline` (monotonic).

    `until` is asked after each reading, and when the descriptor `also` is readable.
    """
    with selectors.DefaultSelector() as selector:
        for program in programs:
            for descriptor in program.descriptors():
                selector.register(descriptor, selectors.EVENT_READ, program)
        if also is not None:
            selector.register(also, selectors.EVENT_READ)
        while not until() and not any(program.is_over for program in programs):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            for key, _ in selector.select(left_s):
                if key.data is not None and not key.data.read(key.fd):
                    selector.unregister(key.fileobj)


def _kill_user(user: int) -> None:
    """Kill whatever runs as `user`, by one call that no fork escapes."""
    killer = os.fork()
    if not killer:
        try:
            os.setresuid(user, user, user)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(killer, 0)


def _ending(code: int) -> tuple[Failure | None, str]:
    if code == -signal.SIGXCPU:
        return "cpu_limit", "it used more CPU time than it may"
    if code < 0:
        return "killed", f"it was killed by {signal.Signals(-code).name}"
    if code > 0:
        return "failed", f"it ended with status {code}"
    return None, ""
