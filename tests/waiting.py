"""Waiting for a state: every test waits with the same guard, wide enough for a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

LONGEST_S = 500.0
"""How long a test waits for something that should come soon. Pytest's own guard is longer, so a
test can still say what it waited for."""


def until(holds: Callable[[], Any], what: Callable[[], object] = lambda: "it") -> Any:
    """What `holds` returns once that is true of it; `what` says what was waited for."""
    deadline = time.monotonic() + LONGEST_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {LONGEST_S:g} s: {what()}"
        time.sleep(0.01)
    return found
