"""Entries of a stage's stream, as a test takes them into its hands."""

from __future__ import annotations

from onstream.pipeline.records import StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Entry


def claim_pending(bus: Bus, stage: StageName, count: int = 256) -> list[Entry]:
    """Up to `count` entries that are pending with `bus`, in order. Counts as a delivery."""
    rows = bus.streams.pending_rows(stage, count=count, consumer=bus.consumer)
    return bus.streams.claim(stage, rows)
