"""What a trainer does or waits for, in words."""

from __future__ import annotations

from onstream.workers.trainer.durability.checkpointing import Checkpointing
from onstream.workers.trainer.durability.recording import Recording
from onstream.workers.trainer.tickets import TicketIssuer
from onstream.workers.trainer.training import Training


def status_text(
    training: Training,
    tickets: TicketIssuer,
    recording: Recording,
    checkpointing: Checkpointing,
    *,
    finished: bool,
) -> str:
    """What a trainer of these parts does or waits for; `finished` says that its run has ended."""
    if finished:
        return f"finished after step {training.step}"
    if tickets.waits_for:
        return f"waits for {tickets.waits_for}"
    if recording.stalled:
        return "waits for room on the disk for the run's journal, see the log"
    if checkpointing.stalled:
        return "waits for a checkpoint: none could be written, see the log"
    missing = training.batches.missing()
    more = "waits for rollouts"
    if missing:
        more = f"waits for {sum(missing.values())} more rollouts of {len(missing)} groups"
    step = f"step {training.step + 1} of {training.max_steps}"
    return f"{step}; {more}{_none_right(training)}"


def _none_right(training: Training) -> str:
    """A warning where a batch's worth of completions came and none was right enough to train on."""
    wrong = training.dropped["not_verified"]
    verified_alone = training.batches.rules.least_reward is not None
    few = wrong < training.batches.units_per_batch  # each of one rollout, where they train alone
    if not verified_alone or training.batches.complete_units or few:
        return ""
    return (
        f"; none of the {wrong} completions since the last step was right, "
        'and keep = "verified" trains on no others'
    )
