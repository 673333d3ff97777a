"""Dead letters of rollouts that the trainer has in hand and cannot train on."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
    entries = {number: acknowledgements.open_entries(number) for number in reasons}
    unread = [number for number, ids in entries.items() if not ids]
    if unread:  # taken from the journal, before the trainer has read what is pending in Redis
        entries |= _pending_entries(bus, unread)
    for number, reason in reasons.items():
        for entry_id in entries[number]:
            entry = bus.streams.look_at("train", entry_id)
            if entry and all(bus.streams.move("train", [dead_letter(entry, "train", reason)])):
                break  # a second entry of the number is acknowledged with the first


def _pending_entries(bus: Bus, numbers: Collection[int]) -> dict[int, list[bytes]]:
    """The pending entries of `numbers`; none for one that has a letter already."""
    found: dict[int, list[bytes]] = {number: [] for number in numbers}
    for row in bus.streams.all_pending_rows("train"):
        entry = bus.streams.look_at("train", row.id)
        if entry and entry.number in found:
            found[entry.number].append(row.id)
    return found
