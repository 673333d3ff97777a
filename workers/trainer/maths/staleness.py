"""How old the policy was that wrote a token. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

UNWRITTEN: Final = -1
"""The staleness of a token that no policy wrote."""


class Span(Protocol):
    """The completion tokens from `start` up to `end`, written by policy `version`."""

    @property
    def version(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


def staleness(oldest: int | None, version: int) -> int:
    """`version`, whose weights take the step, less the oldest version that wrote. In steps, ≥ 0.

    Tokens that no policy wrote, such as an answer from elsewhere, count as 0. So do tokens of a
    newer version: a run that is resumed from an older checkpoint than its last announced version
    meets them.
    """
    if oldest is None:
        return 0
    return max(0, version - oldest)


def token_staleness(spans: Iterable[Span], tokens: int, version: int) -> list[int]:
    """The staleness of each of `tokens` completion tokens in the step that `version` takes.

    It is `UNWRITTEN` outside all spans.
    """
    ages = [UNWRITTEN] * tokens
    for span in spans:
        age = staleness(span.version, version)
        for place in range(span.start, min(span.end, tokens)):
            ages[place] = age
    return ages
