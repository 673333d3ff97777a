"""Records as the trainer's stream brings them."""

from __future__ import annotations

from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample, Tombstone, VersionSpan


def rollout(
    number: int,
    *,
    group_size: int = 4,
    versions: tuple[int, ...] = (0,),
    reward: float | None = 1.0,
) -> Rollout:
    """A rollout with one span of one token for each of `versions`, or one token that no policy
    wrote.
    """
    tokens = max(1, len(versions))
    sample = Sample(
        prompt_ids=ids_bytes([2, 3]),
        completion_ids=ids_bytes([4] * tokens),
        loss_mask=mask_bytes([1] * tokens),
        generator_logprobs=logprobs_bytes([-0.5] * tokens),
        version_spans=[VersionSpan(version, at, at + 1) for at, version in enumerate(versions)],
        completion_text="c" * tokens,
    )
    group = (number - 1) // group_size
    return Rollout(
        number=number,
        group=group,
        group_size=group_size,
        index=group,
        messages=[],
        info={},
        samples=[sample],
        temperature=1.0,
        finish_reason="stop",
        route=["train"],
        reward=reward,
    )


def tombstone(number: int) -> Tombstone:
    """A rollout that will never come."""
    return Tombstone(number, "verify", "given up")
