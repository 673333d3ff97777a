"""A directory of the user's with files named like ours, and Onstream as it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import onstream

SCORER = "mine:score"
REWARD = 0.5


def write_own_modules(directory: Path) -> None:
    """Files that take the place of nothing, and a scorer that imports the user's own `settings`."""
    for name in ("pipeline.py", "redis.py", "workers/__init__.py", "onstream/__init__.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("raise SystemExit('a file of the user in our place')\n")
    (directory / "settings.py").write_text(f"REWARD = {REWARD}\n")
    text = "from settings import REWARD\ndef score(*_): return REWARD\n"
    (directory / "mine.py").write_text(text)


def installed_environment(directory: Path) -> dict[str, str]:
    """The environment of a process that finds `onstream` in `directory`, without the folders at the
    top of a checkout, whose names are those of the user's files.
    """
    directory.mkdir()
    (directory / "onstream").symlink_to(Path(onstream.__file__).parent)
    return {**os.environ, "PYTHONPATH": str(directory)}
