"""How old the policy was that wrote a rollout. Pure: it reads the version spans and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.records import Rollout


def oldest_version(rollout: Rollout) -> int | None:
    """The oldest policy version that wrote any of the rollout's tokens; None where no policy wrote one."""
    return min((span.version for sample in rollout.samples for span in sample.version_spans), default=None)


def staleness(oldest: int | None, version: int) -> int:
    """`version`, whose weights take the step, less the oldest version that wrote; 0 when trained at its own version.

    What no policy wrote (an answer from elsewhere, say) has no staleness: 0. Nor has what a newer version wrote, as a
    run meets it that was resumed from a checkpoint older than its last announced version.
    """
    return 0 if oldest is None else max(0, version - oldest)
