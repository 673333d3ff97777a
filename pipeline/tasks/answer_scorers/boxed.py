r"""Finds the answer that a completion puts into `\boxed{…}`."""

from __future__ import annotations

_BOX = r"\boxed{"


def last_boxed(text: str) -> str | None:
    r"""What is in the last `\boxed{…}` of `text`; None where there is none, or it is not closed.

    >>> last_boxed(r"First \boxed{1}, then \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    begin = start + len(_BOX)
    depth = 1
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin:at]
    return None
