"""How old the policy was that wrote a rollout, or a token of it. Pure: it reads the version spans
and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from onstream.pipeline.records import Rollout, VersionSpan

UNWRITTEN: Final = -1
"""The staleness of a token that no policy wrote."""


def oldest_version(rollout: Rollout) -> int | None:
    """The oldest policy version that wrote any of the rollout's tokens; None where no policy wrote
    one.
    """
    return min(
        (span.version for sample in rollout.samples for span in sample.version_spans), default=None
    )


def staleness(oldest: int | None, version: int) -> int:
    """`version`, whose weights take the step, less the oldest version that wrote; 0 when trained at
    its own version.

    What no policy wrote (an answer from elsewhere, say) has no staleness: 0. Nor has what a newer
    version wrote, as a run meets it that was resumed from a checkpoint older than its last
    announced version.
    """
    return 0 if oldest is None else max(0, version - oldest)


def token_staleness(spans: Iterable[VersionSpan], tokens: int, version: int) -> list[int]:
    """The staleness of each of `tokens` completion tokens, trained with the weights of `version`;
    `UNWRITTEN` outside all spans.
    """
    ages = [UNWRITTEN] * tokens
    for span in spans:
        ages[span.start : span.end] = [staleness(span.version, version)] * len(
            ages[span.start : span.end]
        )
    return ages
