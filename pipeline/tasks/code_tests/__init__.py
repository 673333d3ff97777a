"""Tests that are Python code, in another process than the program that they test.

`judge` is the scorer's side. `checker_side` runs the tests and `program_side` the program, each in
a jail of its own, and `wire` is what they send each other. docs/sandbox.md has the reasons.
"""

from onstream.pipeline.tasks.code_tests.judge import judge

__all__ = ["judge"]
