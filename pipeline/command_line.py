"""How a person starts `onstream` here, for commands in messages that work as they are printed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

NAME = "onstream"


def command() -> str:
    """`onstream` where that is on the path; else the way in which this process was started.

    In a virtual environment that is not activated, such as that of `make up`, the name alone would
    start nothing, or another installation.
    """
    started = Path(sys.argv[0])
    if started.name == NAME and started.exists():
        found = shutil.which(NAME)
        if found is not None and os.path.samefile(found, started):
            return NAME
        return _shorter(started)
    if started.name == "__main__.py" and started.parent.name == NAME:
        return f"{_shorter(Path(sys.executable))} -m {NAME}"
    return NAME


def _shorter(path: Path) -> str:
    """`path` from the working directory on, where it is in that."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path)
