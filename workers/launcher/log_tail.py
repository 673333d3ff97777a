"""The last words of a worker, as a person reads them."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from onstream.settings.decoding import UNDECODABLE

KNOWN_ALREADY = ("timestamp", "level", "run", "stage", "worker", "event")


def last_lines(path: Path, count: int = 12) -> list[str]:
    """The last lines of a log, without blank ones; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as log:
        lines = deque((line.rstrip() for line in log if line.strip()), maxlen=count)
    return [readable for line in lines for readable in as_text(line)]


def as_text(line: str) -> list[str]:
    """A line of a log as text: JSON lines become their event, its particulars and its traceback,
    others stay.

    >>> as_text('{"event": "no answer", "url": "http://a", "level": "warning", "worker":
    "score-1"}') ["warning: no answer url='http://a'"]
    """
    try:
        row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
    except UNDECODABLE:
        return [line]
    traceback = str(row.pop("exception", "")).splitlines()
    particulars = " ".join(
        f"{name}={value!r}" for name, value in row.items() if name not in KNOWN_ALREADY
    )
    return [
        f"{row.get('level', 'info')}: {row.get('event', '')} {particulars}".rstrip(),
        *traceback,
    ]
