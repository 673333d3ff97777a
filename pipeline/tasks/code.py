"""The scorer `code`: runs the program of a completion against the problem's tests, in a sandbox."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.code_tests import judge
from onstream.pipeline.tasks.sandbox import REQUIRED, Sandbox, SandboxError
from onstream.pipeline.tasks.scorers import Score, Scorer, answer_text
from onstream.settings.root import Settings

_FENCE = re.compile(
    r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE
)
_MEANING = {
    "user": "an unprivileged user",
    "kill": "a way to end all that a program starts",
    "files": "a file system of its own (programs read what any user of this machine may read)",
    "processes": "a process tree of its own",
    "network": "a network of its own (programs may open connections)",
    "calls": "a filter of system calls (memory of memfd and System V is then without a bound)",
    "memory": "a way to see its memory (each process is bounded, and not all of them together)",
}


def code_scorer(settings: Settings) -> Scorer:
    """The scorer, after a check of what the machine permits.

    Raises:
        UserError: programs cannot be confined here, and
            `orchestrator.verification.allow_unsandboxed` is false.
    """
    verification = settings.orchestrator.verification
    if verification.sandbox.wall >= verification.timeout:
        raise UserError(
            f"orchestrator.verification.sandbox.wall = {verification.sandbox.wall:g} s",
            expected="less than orchestrator.verification.timeout "
            f"({verification.timeout:g} s), which kills the scorer itself",
            next_step="Lower the one or raise the other.",
        )
    _refuse_unconfined(Sandbox(verification.sandbox), allowed=verification.allow_unsandboxed)

    def score(completion: str, info: dict[str, Any]) -> Score:
        # Made here, in the scorer process: each runs its programs as a user of its own.
        return score_program(
            Sandbox(verification.sandbox),
            program_of(completion),
            info,
            verification.sandbox.wall,
        )

    return score


def _refuse_unconfined(sandbox: Sandbox, *, allowed: bool) -> None:
    try:
        missing = sandbox.missing()
    except SandboxError as error:
        raise UserError(
            f"task.scorer = 'code': {error}",
            expected="a machine that runs programs in a sandbox",
            next_step="See docs/sandbox.md.",
        ) from error
    lacking = [_MEANING[name] for name in missing]
    if any(name in REQUIRED for name in missing) and not allowed:
        raise UserError(
            f"task.scorer = 'code' on a machine that does not permit {', '.join(lacking)}",
            expected="a Linux where the verifier is root or may make user namespaces",
            next_step="See docs/sandbox.md. orchestrator.verification.allow_unsandboxed = true "
            "runs the programs all the same.",
        )
    if lacking:
        print(
            f"onstream: the sandbox of task.scorer = 'code' does without {', '.join(lacking)}",
            file=sys.stderr,
        )


def program_of(completion: str) -> str:
    """The program in a completion: its last fenced block after the reasoning, or else all of it.

    >>> program_of("Here it is:\\n```python\\nprint(1)\\n```")
    'print(1)\\n'
    """
    answer = answer_text(completion)
    blocks = _FENCE.findall(answer)
    return str(blocks[-1]) if blocks else answer


def score_program(sandbox: Sandbox, program: str, info: dict[str, Any], wall_s: float) -> Score:
    """1 if `program` passes every test of the problem `info`, else 0.

    Parts are `passed`, the share of tests that it passes, and `program_<reason>` = 1 for the first
    failure.

    `tests` are Python code, which calls what the program defines, or a list of `{"input",
    "output"}`: what it reads, and what it has to write. White space at the ends of lines and of
    the whole does not count. `wall_s` bounds all tests together.

    Raises:
        ValueError: `tests` are neither.
    """
    tests = info.get("tests")
    if isinstance(tests, str) and tests.strip():
        failures = [_judged(sandbox, program, tests, info.get("entry_point"), wall_s)]
    else:
        failures = list(_output_failures(sandbox, program, _listed(tests), wall_s))
    reasons = [failure for failure in failures if failure]
    score = {
        "reward": float(not reasons),
        "passed": (len(failures) - len(reasons)) / len(failures),
    }
    if reasons:
        score[f"program_{reasons[0]}"] = 1.0
    return score


def _judged(sandbox: Sandbox, program: str, tests: str, entry_point: object, wall_s: float) -> str:
    if entry_point is not None and not isinstance(entry_point, str):
        raise ValueError(f"the problem's `entry_point` is {entry_point!r}; expected a name")
    return judge(sandbox, program, tests, entry_point, wall_s)


def _output_failures(
    sandbox: Sandbox, program: str, tests: list[dict[str, str]], wall_s: float
) -> Iterator[str]:
    """For each test, why the program does not pass it; empty where it does."""
    end = time.monotonic() + wall_s
    for test in tests:
        left_s = end - time.monotonic()
        if left_s <= 0:
            yield "timed_out"
            continue
        result = sandbox.run(program, test.get("input", "").encode(), wall_s=left_s)
        yield result.failure or _wrong_output(result.output, test["output"])


def _listed(tests: object) -> list[dict[str, str]]:
    if not isinstance(tests, list) or not tests:
        raise ValueError(
            f"the problem's `tests` are {type(tests).__name__}; "
            "expected Python code or a list of input and output"
        )
    if not all(_is_test(test) for test in tests):
        raise ValueError("a test is not {'input': text, 'output': text}")
    return tests


def _is_test(test: object) -> bool:
    return (
        isinstance(test, dict)
        and isinstance(test.get("output"), str)
        and isinstance(test.get("input", ""), str)
    )


def _wrong_output(output: bytes, expected: str) -> str:
    right = _lines(output.decode(errors="replace")) == _lines(expected)
    return "" if right else "wrong_output"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
