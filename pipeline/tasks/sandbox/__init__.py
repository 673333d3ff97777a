"""Runs programs that nobody has read. docs/sandbox.md says what holds them."""

from onstream.pipeline.tasks.sandbox.running_program import (
    ProgramResult,
    RunningProgram,
    SandboxError,
    watch,
)
from onstream.pipeline.tasks.sandbox.sandbox import REQUIRED, Sandbox, encoded

__all__ = [
    "REQUIRED",
    "ProgramResult",
    "RunningProgram",
    "Sandbox",
    "SandboxError",
    "encoded",
    "watch",
]
