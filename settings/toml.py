"""Settings as TOML text: Python reads TOML but does not write it."""

from __future__ import annotations

import json
from typing import Any

from onstream.settings.fields import HIDDEN, known_in
from onstream.settings.root import Settings


def toml_value(value: Any) -> str:
    """`value` (JSON data without null) as TOML writes it.

    >>> toml_value({"min length": 4, "words": ["a"]})
    '{"min length" = 4, words = ["a"]}'
    """
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which JSON leaves bare.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item is not None}
        pairs = [f"{_key(key)} = {toml_value(item)}" for key, item in given.items()]
        return "{" + ", ".join(pairs) + "}"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def toml_text(settings: Settings) -> str:
    """All of `settings` as a TOML file that loads again.

    Secrets read `***`, which loads as unset.
    """
    head = "# Resolved settings of the run. Secrets are hidden: give them again by the environment."
    lines = [head]
    section = None
    for name, setting in known_in(settings).items():
        value = setting.value(settings)
        if value is None:
            continue
        table, _, key = name.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """`value` as a person reads it: TOML, `unset` for nothing."""
    if value == HIDDEN:
        return HIDDEN
    return "unset" if value is None else toml_value(value)


def shown_bytes(count: float) -> str:
    """`count` bytes in a unit that leaves few digits.

    >>> shown_bytes(16_089_872_384)
    '16.1 GB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _key(key: str) -> str:
    bare = all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in key)
    return key if key and bare else toml_value(key)
