"""vLLM's workers with a fault that can be switched on: the one that every built-in reload of a tied
model has on a CPU.
"""

from __future__ import annotations

from typing import Any

from onstream.workers.generator.engines.vllm import extension

_repack = extension.repack_tied_head


class Forgetful(extension.Extension):
    """`Extension` whose updates may leave the packed copy of the tied head as it was."""

    def forget_the_head(self: Any, forget: bool) -> None:
        """From the next update on, leave the head behind, or no longer."""
        extension.repack_tied_head = _leave_it if forget else _repack


def _leave_it(model: Any) -> None:
    pass
