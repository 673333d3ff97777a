"""Results of single runs, kept as they come, so that a stopped benchmark goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Identity = Mapping[str, Any]
Result = dict[str, Any]


class KeptResults:
    """A file with one run a line: its identity, and its result.

    A run of the same identity is not done again. The identity holds whatever a result depends on,
    versions too: after a change of those, the run is another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self._cut_off = bool(text) and not text.endswith("\n")
        rows = map(_row, text.splitlines())
        self._found: dict[str, Result] = {key(row["run"]): row["result"] for row in rows if row}

    def has(self, run: Identity) -> bool:
        return key(run) in self._found

    def get(self, run: Identity, measure: Callable[[], Result]) -> Result:
        """The kept result of `run`, or what `measure` gives, which is then kept."""
        if not self.has(run):
            self._add(run, measure())
        return self._found[key(run)]

    def _add(self, run: Identity, result: Result) -> None:
        line = json.dumps({"run": run, "result": result}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" + line if self._cut_off else line)
        self._cut_off = False
        self._found[key(run)] = result


def key(run: Identity) -> str:
    """The identity as text, whatever the order of its fields."""
    return json.dumps(run, sort_keys=True)


def _row(line: str) -> dict[str, Any] | None:
    """The run of a line; None for one that was cut off while it was written."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
