"""Records that a resumed trainer takes again from the journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import Tombstone
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import RecordFrame
from onstream.workers.trainer.durability import unsettled_records
from onstream.workers.trainer.durability.unsettled_records import UnsettledRecords


def test_they_are_taken_by_so_many_bytes_at_once_and_one_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsettled_records, "TAKEN_BYTES", 3000)
    records = [Tombstone(number, "verify", "x" * 1000) for number in (1, 2, 3, 4)]
    records += [Tombstone(number, "verify", "x" * 4000) for number in (5, 6)]
    frames = [RecordFrame(record.number, 1.0, encode(record)) for record in records]
    recording.write_records(tmp_path / recording.UNSETTLED, frames)
    unsettled = UnsettledRecords(tmp_path, None, [], lambda digests: [None] * len(digests))
    taken = []
    while unsettled.waiting:
        taken.append([record.number for record, _ in unsettled.take(256)])
    assert taken == [[1, 2, 3], [4, 5], [6]]
