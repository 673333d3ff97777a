"""Runs a program in processes that can be killed, under limits, as a user who owns nothing.

Linux only. Namespaces hide the machine's files, processes and network where they are permitted: to
root, and to other users where the kernel lets them make user namespaces. `Sandbox.missing` lists
what is not permitted.
"""

from __future__ import annotations

import itertools
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType
from typing import IO, Any

from onstream.pipeline.tasks.sandbox.running_program import (
    ProgramResult,
    RunningProgram,
    SandboxError,
    watch,
)
from onstream.settings.sections.orchestrator import SandboxSettings

JAIL = Path(__file__).with_name("jail.py")
START_JAIL = (
    "import marshal, sys\nwith open(int(sys.argv[1]), 'rb') as file:\n"
    "    jail = {'__name__': 'jail'}\n    exec(marshal.load(file), jail)\n"
    "    spec = marshal.load(file)\njail['main'](spec, int(sys.argv[2]))"
)
"""Runs the jail's code, which this process has compiled: each program would wait for that."""
REQUIRED = ("user", "kill")
"""Without these the program could read the environment of the process that runs it, or outlive it.
"""
OPTIONAL = ("files", "processes", "network", "calls", "memory")
FIRST_USER = 61184
"""The first user id of a range that no system gives to people."""
USERS = 4336
USERS_OF_ONE = 16
"""How many of them one process uses in turn."""
TRIAL_PROGRAM = "import os, sys\nprint(sum(range(10)))"
TRIAL_OUTPUT = b"45"
TRIAL_S = 10.0
PROGRAM = "program.py"

_runs = itertools.count()


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
        deadline = time.monotonic() + wall_s
        with self.start({PROGRAM: encoded(program)}, [PROGRAM], given) as running:
            watch([running], deadline)
        return running.result(wall_s)

    def start(
        self,
        files: Mapping[str, bytes],
        arguments: Sequence[str],
        given: bytes,
        descriptors: Sequence[int] = (),
    ) -> RunningProgram:
        """Start Python with `arguments` in a jail, in a directory that has `files`.

        It reads `given` on its standard input and inherits `descriptors`.
        """
        # Another user for each run: dead processes of the last run that nobody has waited for
        # count against the limit of its user.
        # Scorer processes beside each other have users of their own, if their ids are near.
        mine = os.getpid() % (USERS // USERS_OF_ONE)
        self._user = FIRST_USER + mine * USERS_OF_ONE + next(_runs) % USERS_OF_ONE
        scratch = tempfile.mkdtemp(prefix="onstream-")
        spec = self._spec(files, arguments, scratch)
        status, status_end = os.pipe()
        try:
            with tempfile.TemporaryFile() as spec_file, tempfile.TemporaryFile() as stdin:
                stdin.write(given)
                stdin.seek(0)
                spec_file.write(marshal.dumps(_jail_code()) + marshal.dumps(spec))
                spec_file.seek(0)
                jail = _start_jail(spec_file, stdin, status_end, descriptors)
        except BaseException:
            os.close(status)
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        finally:
            os.close(status_end)
        return RunningProgram(jail, status, scratch, self._user, self._settings.output)

    def _spec(
        self, files: Mapping[str, bytes], arguments: Sequence[str], scratch: str
    ) -> dict[str, Any]:
        limits = self._settings
        return {
            "files": dict(files),
            "arguments": list(arguments),
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


def encoded(program: str) -> bytes:
    """`program` as a file: what cannot be written reads `?`."""
    return program.encode(errors="replace")


@cache
def _jail_code() -> CodeType:
    return compile(JAIL.read_text(encoding="utf-8"), str(JAIL), "exec", dont_inherit=True)


def _start_jail(
    spec: IO[bytes], stdin: IO[bytes], status: int, descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    return subprocess.Popen(
        [*python, "-c", START_JAIL, str(spec.fileno()), str(status)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        pass_fds=[spec.fileno(), status, *descriptors],
        start_new_session=True,
    )
