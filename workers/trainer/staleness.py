"""How old the policy was that wrote a rollout. Pure."""

from __future__ import annotations

from pipeline.records import Rollout


def oldest_version(rollout: Rollout) -> int | None:
    """The oldest policy version that wrote any of the rollout's tokens; None where no policy wrote one."""
    return min((span.version for sample in rollout.samples for span in sample.version_spans), default=None)


def staleness(rollout: Rollout, version: int) -> int:
    """`version`, whose weights take the step, less the oldest version that wrote; 0 when trained at its own version.

    What no policy wrote (an answer from elsewhere, say) has no staleness: 0.

    Raises:
        ValueError: the rollout claims a version newer than the one that takes the step.
    """
    oldest = oldest_version(rollout)
    if oldest is None:
        return 0
    if oldest > version:
        raise ValueError(
            f"rollout {rollout.number} was written by policy version {oldest}, newer than version {version} that takes the step"
        )
    return version - oldest
