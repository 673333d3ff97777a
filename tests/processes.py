"""The processes of a running `onstream up`, as the system lists them."""

from __future__ import annotations

import psutil

from tests.waiting import until


def living(launcher: int, words: str) -> list[psutil.Process]:
    """The children of `launcher` whose command line has `words`; one that has died and waits to be
    reaped has none.
    """
    found = []
    for child in psutil.Process(launcher).children():
        try:
            command = " ".join(child.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if words in command:
            found.append(child)
    return found


def worker(launcher: int, kind: str) -> psutil.Process:
    """The one worker of `kind`, waited for while a launcher is restarting it."""
    found: list[psutil.Process] = until(
        lambda: living(launcher, f" worker {kind} "), lambda: f"a {kind} under {launcher}"
    )
    assert len(found) == 1, [child.cmdline() for child in found]
    return found[0]
