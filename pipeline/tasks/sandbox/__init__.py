"""Runs programs that nobody has read. docs/sandbox.md says what holds them."""

from onstream.pipeline.tasks.sandbox.sandbox import (
    REQUIRED,
    ProgramResult,
    Sandbox,
    SandboxError,
)

__all__ = ["REQUIRED", "ProgramResult", "Sandbox", "SandboxError"]
