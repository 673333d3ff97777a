"""What a person is told when something is wrong, and the exit codes that a supervisor acts on."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """Exit codes of every `onstream` process."""

    OK = 0
    FAILED = 1  # an error of its own; a supervisor restarts it
    USAGE = 2  # wrong settings or arguments; restarting does not help
    REFUSED = 3  # the run's plan, lease or data forbid this worker; restarting does not help
    STUCK = 4  # a handler outlived its bound; a supervisor restarts it
    UNREACHABLE = 5  # Redis or another service did not answer in time; a supervisor restarts it


class UserError(Exception):
    """A problem the user can mend: `got` the value, `expected`, and the `next_step`.

    Its text reads on one line; `exit` is the process's exit code.
    """

    def __init__(self, got: str, *, expected: str, next_step: str, exit: Exit = Exit.USAGE) -> None:
        self.got = got
        self.expected = expected
        self.next_step = next_step
        self.exit = exit
        super().__init__(f"{got}; expected {expected}. {next_step}")


def looked_in(path: Path) -> str:
    """Where a `path` that is not there was looked for, for a message; nothing if it says so itself.

    >>> looked_in(Path("/data/problems.jsonl"))
    ''
    """
    return "" if path.is_absolute() else f" in {Path.cwd()}"


class LeaseLost(Exception):
    """Another trainer took the run over; what this one was about to do did not happen."""
