"""The last lines of a worker's log, as a person reads them."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from onstream.settings.decoding import UNDECODABLE

SHOWN_ELSEWHERE = ("timestamp", "level", "run", "stage", "worker", "event")


def last_lines(path: Path, count: int = 12) -> list[str]:
    """The last lines of a log, without blank ones; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as log:
        lines = deque((line.rstrip() for line in log if line.strip()), maxlen=count)
    return [readable for line in lines for readable in as_text(line)]


def as_text(line: str) -> list[str]:
    """A line of a log as text: a JSON line becomes its event, its fields and its traceback.

    >>> as_text('{"event": "no answer", "url": "http://a", "level": "warning", "worker":
    "score-1"}') ["warning: no answer url='http://a'"]
    """
    try:
        row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
    except UNDECODABLE:
        return [line]
    traceback = str(row.pop("exception", "")).splitlines()
    fields = " ".join(
        f"{name}={value!r}" for name, value in row.items() if name not in SHOWN_ELSEWHERE
    )
    return [
        f"{row.get('level', 'info')}: {row.get('event', '')} {fields}".rstrip(),
        *traceback,
    ]
