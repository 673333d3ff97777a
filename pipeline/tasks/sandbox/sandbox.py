"""Runs a program in processes that can be killed, under limits, as a user who owns nothing.

Linux only. Namespaces hide the machine's files, processes and network where they are permitted: to
root, and to other users where the kernel lets them make user namespaces. `Sandbox.missing` lists
what is not permitted.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from onstream.pipeline.processes import kill_group
from onstream.settings.sections.orchestrator import SandboxSettings

JAIL = Path(__file__).with_name("jail.py")
REQUIRED = ("user", "kill")
"""Without these the program could read the environment of the process that runs it, or outlive it.
"""
OPTIONAL = ("files", "processes", "network")
FIRST_USER = 61184
"""The first user id of a range that no system gives to people."""
USERS = 4336
TRIAL_PROGRAM = "import os, sys\nprint(sum(range(10)))"
TRIAL_OUTPUT = b"45"
TRIAL_S = 10.0
END_S = 5.0
ALL_GONE = b'{"gone": true}\n'
"""What is noted where the jail ended without a last message."""

_runs = itertools.count()
Failure = Literal["timed_out", "output_limit", "cpu_limit", "killed", "failed"]


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


class Sandbox:
    """Runs programs under `settings`, one at a time.

    For a process without other children, or one that waits for each child by its id.
    """

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings
        self._user = FIRST_USER

    def missing(self) -> list[str]:
        """What of REQUIRED and OPTIONAL this machine does not permit.

        Raises:
            SandboxError: no program can be run at all.
        """
        if sys.platform != "linux":
            raise SandboxError(f"there is no sandbox on {sys.platform}")
        result = self.run(TRIAL_PROGRAM, b"", wall_s=TRIAL_S)
        if result.output.strip() != TRIAL_OUTPUT:
            raise SandboxError(
                f"a trial program gave {result.output!r} ({result.message or 'no error'})"
            )
        return [name for name in (*REQUIRED, *OPTIONAL) if name not in result.isolation]

    def run(self, program: str, given: bytes, *, wall_s: float | None = None) -> ProgramResult:
        """Run the Python `program` with `given` on its standard input.

        It may take `wall_s` seconds, by default those of the settings.

        Raises:
            SandboxError: it could not be started.
        """
        wall_s = self._settings.wall if wall_s is None else wall_s
        # Another user for each run: dead processes of the last run that nobody has waited for
        # count against the limit of its user.
        self._user = FIRST_USER + (os.getpid() * 64 + next(_runs)) % USERS
        scratch = tempfile.mkdtemp(prefix="onstream-")
        status, status_end = os.pipe()
        try:
            with tempfile.TemporaryFile() as spec, tempfile.TemporaryFile() as stdin:
                stdin.write(given)
                stdin.seek(0)
                spec.write(json.dumps(self._spec(program, scratch)).encode())
                spec.seek(0)
                jail = self._start(spec, stdin, status_end)
            os.close(status_end)
            status_end = -1
            return self._watch(jail, status, time.monotonic() + wall_s, wall_s)
        finally:
            os.close(status)
            if status_end >= 0:
                os.close(status_end)
            shutil.rmtree(scratch, ignore_errors=True)

    def _spec(self, program: str, scratch: str) -> dict[str, Any]:
        limits = self._settings
        return {
            "program": program,
            "scratch": scratch,
            "python": os.path.realpath(sys.executable),
            "prefix": sys.base_prefix,
            "parent": os.getpid(),
            "user": self._user,
            "outer_user": os.geteuid(),
            "outer_group": os.getegid(),
            "cpu_s": max(1, round(limits.cpu)),
            "memory_bytes": limits.memory << 20,
            "file_bytes": limits.file_size << 20,
            "scratch_bytes": limits.scratch << 20,
            "processes": limits.processes,
        }

    def _start(self, spec: IO[bytes], stdin: IO[bytes], status: int) -> subprocess.Popen[bytes]:
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
        command = [*python, str(JAIL), str(spec.fileno()), str(status)]
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            pass_fds=[spec.fileno(), status],
            start_new_session=True,
        )

    def _watch(
        self, jail: subprocess.Popen[bytes], status: int, deadline: float, wall_s: float
    ) -> ProgramResult:
        """Read what the program writes until it ends, writes too much, or its time is over.

        Then end all of it.
        """
        assert jail.stdout is not None
        output = bytearray()
        message = b""
        with jail.stdout, selectors.DefaultSelector() as selector:
            selector.register(jail.stdout, selectors.EVENT_READ)
            selector.register(status, selectors.EVENT_READ)
            while (
                not _is_over(message)
                and len(output) <= self._settings.output
                and (left_s := deadline - time.monotonic()) > 0
            ):
                for key, _ in selector.select(left_s):
                    data = os.read(key.fd, 1 << 16)
                    if key.fd == status:
                        message += data or ALL_GONE
                    elif data:
                        output += data
                    else:
                        selector.unregister(key.fileobj)
            status_fields = _fields(message)
            self._end(jail, own_processes="processes" in status_fields.get("isolation", ()))
            if _is_over(message):
                self._drain(jail.stdout, output)
        return self._result(bytes(output), status_fields, wall_s)

    def _drain(self, stdout: IO[bytes], output: bytearray) -> None:
        """Read what was written before the end. All processes that could write are gone."""
        os.set_blocking(stdout.fileno(), False)
        try:
            while len(output) <= self._settings.output and (
                data := os.read(stdout.fileno(), 1 << 16)
            ):
                output += data
        except BlockingIOError:
            return

    def _end(self, jail: subprocess.Popen[bytes], *, own_processes: bool) -> None:
        """Kill all that was started.

        In a process namespace of its own, the kernel kills it with its first process; elsewhere it
        is found by its user.
        """
        kill_group(jail.pid)
        jail.wait(END_S)
        if os.geteuid() == 0 and not own_processes:
            self._kill_user()

    def _kill_user(self) -> None:
        """Kill whatever runs as the program's user, by one call that no fork escapes."""
        killer = os.fork()
        if not killer:
            try:
                os.setresuid(self._user, self._user, self._user)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(killer, 0)

    def _result(self, output: bytes, fields: dict[str, Any], wall_s: float) -> ProgramResult:
        if "error" in fields:
            raise SandboxError(f"the sandbox could not start a program: {fields['error']}")
        isolation = tuple(fields.get("isolation", ()))
        if os.geteuid() == 0 or "processes" in isolation:
            isolation = (*isolation, "kill")
        most = self._settings.output
        if len(output) > most:
            message = f"it wrote more than {most} bytes"
            return ProgramResult(output[:most], "output_limit", message, isolation)
        if "gone" in fields:
            message = "all of it was killed, perhaps for want of memory"
            return ProgramResult(output, "killed", message, isolation)
        if "code" not in fields:
            message = f"it ran longer than {wall_s:g} s"
            return ProgramResult(output, "timed_out", message, isolation)
        return ProgramResult(output, *_ending(fields["code"]), isolation)


def _fields(message: bytes) -> dict[str, Any]:
    """The jail's status so far: its isolation, then how the program ended or what stopped it."""
    lines = message.split(b"\n")[:-1]
    return {name: value for line in lines for name, value in json.loads(line).items()}


def _is_over(message: bytes) -> bool:
    return not {"code", "error", "gone"}.isdisjoint(_fields(message))


def _ending(code: int) -> tuple[Failure | None, str]:
    if code == -signal.SIGXCPU:
        return "cpu_limit", "it used more CPU time than it may"
    if code < 0:
        return "killed", f"it was killed by {signal.Signals(-code).name}"
    if code > 0:
        return "failed", f"it ended with status {code}"
    return None, ""
