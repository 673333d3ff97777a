"""The checker's side: runs the tests, which call the program in its own process, and reports.

It needs the standard library alone. Standard input has the tests and a secret. The report goes to
a pipe that the program has no end of, and bears the secret.
"""

from __future__ import annotations

import _socket
import ast
import builtins
import ctypes
import json
import os
import sys
import types

from onstream.pipeline.tasks.code_tests.names import names_in, pythons
from onstream.pipeline.tasks.code_tests.program_link import ProgramExit, ProgramLink
from onstream.pipeline.tasks.code_tests.wire import Channel

TYPE_CHECKING = False  # as typing has it, whose import takes long where each try pays for it
if TYPE_CHECKING:
    from typing import Any, NoReturn

TESTS = "tests.py"
PR_SET_DUMPABLE = 4


class TestsBroken(Exception):
    """The tests are at fault, whatever the program does."""


def hide_memory() -> None:
    """Let no process of this user read this one, should a program see it at all."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def check(tests: str, entry_point: str | None, link: ProgramLink) -> bool:
    """Whether the program passes `tests`.

    Raises:
        TestsBroken: they are no Python, or never use the program.
    """
    try:
        tree = ast.parse(tests, TESTS)
        code = compile(tree, TESTS, "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TestsBroken(f"the problem's `tests` are not Python: {error}") from error
    try:
        names = _namespace(tree, entry_point, link)
        exec(code, names)
        if entry_point and _has_uncalled_check(tree):
            names["check"](names[entry_point])
    except SystemExit as end:
        # `unittest.main()` ends so. The program's own exits have a class of their own.
        passed = not isinstance(end, ProgramExit) and not end.code
    except BaseException:
        passed = False
    else:
        passed = True
    if passed and not link.calls:
        raise TestsBroken(
            "the problem's `tests` never call the program; expected tests that do, such as "
            "`assert f(1) == 2`, or `check(f)` at their end"
        )
    return passed and not link.fault


def _namespace(tree: ast.Module, entry_point: str | None, link: ProgramLink) -> dict[str, Any]:
    """The names that the tests find: Python's own, and those of the program that they read."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    programs, own = names_in(tree, entry_point)
    found = module.__dict__
    found["__builtins__"] = builtins
    modules = (name for name in own if not hasattr(builtins, name))
    found.update({name: pythons(name, tree) for name in modules})
    wanted = programs | ({entry_point} if entry_point else set())
    found.update({name: link.named(name) for name in wanted & link.start()})
    return found


def _has_uncalled_check(tree: ast.Module) -> bool:
    """Whether the tests are a function `check(candidate)` that they leave to others to call."""
    defined = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return defined and not any(name.id == "check" for name in names)


def main() -> NoReturn:
    """Check, report, and end at once: no thread of the tests keeps this process."""
    hide_memory()
    channel, report_end = map(int, sys.argv[1:])
    sys.argv = [TESTS]  # which `unittest.main()` reads
    request = json.load(sys.stdin)
    link = ProgramLink(Channel(_socket.socket(fileno=channel)))
    try:
        passed = check(request["tests"], request["entry_point"], link)
        outcome = {"outcome": "passed" if passed else "failed"}
    except TestsBroken as error:
        outcome = {"outcome": "broken", "message": str(error)}
    report = json.dumps(outcome | {"secret": request["secret"]})
    os.write(report_end, report.encode() + b"\n")
    os._exit(0)
