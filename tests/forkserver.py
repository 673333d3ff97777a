"""One fork server for all tests that start worker processes: whatever they need is imported once,
and a fork takes milliseconds.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = [
    "tests.pipeline.crash_workers",
    "tests.fault_workers",
    "onstream.workers.trainer.startup",
]


def context() -> ForkServerContext:
    """The context to start processes from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found
