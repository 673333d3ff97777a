"""The commands of `onstream`, as the benchmarks call them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def onstream(*arguments: str) -> None:
    """A command of `onstream`. Raises SystemExit where it fails: it has said why."""
    done = subprocess.run([sys.executable, "-m", "onstream", *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def exported(run: Path, directory: Path) -> Path:
    """`directory` with the newest version of the run in `run`, as a model directory."""
    if not directory.exists():
        onstream("export", str(run), "--out", str(directory))
    return directory
