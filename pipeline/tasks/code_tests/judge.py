"""Judges a program by tests that are Python code: two jails, and a report that the program cannot
forge, since it holds neither the secret nor an end of the pipe that the report comes through.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import marshal
import os
import secrets
import socket
import time
from functools import cache
from importlib.util import MAGIC_NUMBER
from pathlib import Path

from onstream.pipeline.tasks.sandbox import RunningProgram, Sandbox, encoded, watch

MAX_REPORT_BYTES = 1 << 16
PACKAGE = "onstream/pipeline/tasks/code_tests"
"""Where our modules lie in a jail. Python finds them there by the names that they have here."""
START = "import sys; sys.path.insert(0, 'lib'); from {module} import main; main()"
CHECKER_MODULES = ("wire", "names", "remote", "program_link", "checker_side")
PROGRAM_MODULES = ("wire", "program_side")


def judge(
    sandbox: Sandbox, program: str, tests: str, entry_point: str | None, wall_s: float
) -> str:
    """Why `program` does not pass `tests`; empty where it does.

    Each of them runs in a jail of its own of `sandbox`. Both end within `wall_s` seconds.

    Raises:
        ValueError: the tests are at fault.
    """
    deadline = time.monotonic() + wall_s
    secret = secrets.token_hex(16)
    request = {"tests": tests, "entry_point": entry_point, "secret": secret}
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        report, report_end = os.pipe()
        stack.callback(os.close, report)
        try:
            checker = stack.enter_context(
                sandbox.start(
                    _modules(CHECKER_MODULES),
                    [*_start("checker_side"), str(ours.fileno()), str(report_end)],
                    json.dumps(request).encode(),
                    [ours.fileno(), report_end],
                )
            )
        finally:
            os.close(report_end)
        running = stack.enter_context(
            sandbox.start(
                {"program.py": encoded(program), **_modules(PROGRAM_MODULES)},
                [*_start("program_side"), str(theirs.fileno())],
                b"",
                [theirs.fileno()],
            )
        )
        # Each end is then held by one jail alone, so that the end of one is seen by the other.
        ours.close()
        theirs.close()
        reader = _Report(report, secret)
        watch([running, checker], deadline, also=report, until=reader.read)
        reader.read()
    return _failure(reader, running, checker, wall_s)


class _Report:
    """What the checker reports. A report without the secret is none."""

    def __init__(self, descriptor: int, secret: str) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._secret = secret
        self._data = b""
        self.outcome = ""
        self.message = ""

    def read(self) -> bool:
        """Read what there is; whether the report is whole."""
        with contextlib.suppress(BlockingIOError):
            self._data += os.read(self._descriptor, MAX_REPORT_BYTES)
        line, end, _ = self._data.partition(b"\n")
        if end and not self.outcome:
            self._take(json.loads(line))
        return bool(self.outcome)

    def _take(self, fields: dict[str, str]) -> None:
        genuine = hmac.compare_digest(fields.get("secret", ""), self._secret)
        self.outcome = fields["outcome"] if genuine else "failed"
        self.message = fields.get("message", "")


def _failure(
    report: _Report, program: RunningProgram, checker: RunningProgram, wall_s: float
) -> str:
    """Why the program does not pass, after all has ended; empty where the checker says it does."""
    program_result = program.result(wall_s)
    checker_result = checker.result(wall_s)
    if report.outcome == "passed":
        return ""
    if report.outcome == "broken":
        raise ValueError(report.message)
    if program.ended_itself:
        return program_result.failure or "failed"
    if report.outcome or checker.ended_itself:
        limited = checker.ended_itself and checker_result.failure
        return limited or "failed"
    return "timed_out"


def _start(module: str) -> list[str]:
    name = f"{PACKAGE.replace('/', '.')}.{module}"
    return ["-c", START.format(module=name)]


@cache
def _modules(names: tuple[str, ...]) -> dict[str, bytes]:
    """Our modules, by where they lie in a jail: compiled, or each program would wait for it."""
    return {f"lib/{PACKAGE}/{name}.pyc": _compiled(name) for name in names}


def _compiled(name: str) -> bytes:
    """A module as a file `.pyc`: magic number, flags, time and size of the source, and code."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    code = compile(source, f"{PACKAGE}/{name}.py", "exec", dont_inherit=True)
    return MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
