"""Dead letters of rollouts that the trainer has in hand and cannot train on."""

from __future__ import annotations

from collections.abc import Mapping

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import dead_letter
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements


def write_dead_letters(
    bus: Bus, acknowledgements: Acknowledgements, reasons: Mapping[int, str]
) -> None:
    """Put a tombstone in the place of each rollout in `reasons`, and the rollout, with the reason
    of its number, among the dead letters.

    One script moves each entry, so that a kill leaves it a rollout or a tombstone, and never two
    letters. Whoever resumes the run meets the tombstone. This trainer does too, and passes it over:
    the number is in its hands already.
    """
    for number, reason in reasons.items():
        for entry_id in acknowledgements.open_entries(number):
            entry = bus.streams.look_at("train", entry_id)
            if entry and all(bus.streams.move("train", [dead_letter(entry, "train", reason)])):
                break  # a second entry of the number is acknowledged with the first
