"""What the trainer says of itself in its heartbeat. Pure."""

from __future__ import annotations

from onstream.workers.trainer.training import Training


def status_text(
    training: Training, *, finished: bool, waits_for: str, stalled: bool, batch_size: int
) -> str:
    """What the trainer does or waits for, in words."""
    if finished:
        return f"finished after step {training.step}"
    if waits_for:
        return f"waits for {waits_for}"
    if stalled:
        return "waits for a checkpoint: none could be written, see the log"
    missing = training.batches.missing()
    return (
        f"step {training.step + 1} of {training.max_steps}; "
        f"{sum(missing.values())} rollouts of {len(missing)} open groups to come"
        f"{_none_right(training, batch_size)}"
    )


def _none_right(training: Training, batch_size: int) -> str:
    """A warning where a batch's worth of completions came and none was right enough to train on."""
    wrong = training.dropped["not_verified"]
    verified_alone = training.batches.rules.least_reward is not None
    if not verified_alone or training.batches.complete_units or wrong < batch_size:
        return ""
    return (
        f"; none of the {wrong} completions since the last step was right, "
        'and keep = "verified" trains on no others'
    )
