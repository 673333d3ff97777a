"""Records that the trainer before this one had considered, and that no checkpoint has settled.

Redis may not have them any more: they were acknowledged when the journal was durable. They are
taken again from the journal, in the same order, so that the same steps follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from onstream.pipeline.images.feature_cache import FetchImages
from onstream.pipeline.record_codec import decode_unchecked
from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import JournalMark, RecordFrame, RecordingError
from onstream.pipeline.telemetry import get_logger
from onstream.workers.trainer.durability.acknowledgements import RangeSet, SettledNumbers
from onstream.workers.trainer.durability.checkpoint import TrainerState

log = get_logger()
TAKEN_BYTES = 32 << 20


class UnsettledRecords:
    """The records to take again after a resume from the checkpoint `state` (None: the run's start).

    `places` say where the journals that fit the checkpoint hold them. They are copied into a file
    of their own, durable when this returns: from then on the journals may be cut back. The file
    stays until each of its records is in the journal again, and so survives any number of kills.

    A record whose images are gone from Redis is left out: it is issued again.

    Args:
        dead: numbers of dead letters. Where the trainer before gave up a rollout, it is a tombstone
            now, as its entry in Redis is: the same batch would fail again.
        images: gives the bytes of images by digest.

    Raises:
        OSError: the disk is full; nothing was changed.
    """

    def __init__(
        self,
        run_dir: Path,
        state: TrainerState | None,
        places: Sequence[JournalMark],
        images: FetchImages,
        dead: Collection[int] = (),
    ) -> None:
        self._dead = dead
        self._path = run_dir / recording.UNSETTLED
        self._settled = SettledNumbers(state.settled if state else None)
        self._images = images
        written = recording.write_records(self._path, self._collect(run_dir, places))
        self.numbers = RangeSet.of(written)
        """Those that the journal does not have again yet."""
        self._left_to_take = len(written)
        self._records = recording.read_records(self._path)
        if written:
            log.info("rollouts of the run's journal are taken again", rollouts=len(written))

    @property
    def waiting(self) -> bool:
        """Whether records are left to be taken."""
        return self._left_to_take > 0

    def take(self, most: int) -> Iterator[tuple[Rollout | Tombstone, float]]:
        """The next records, each once, with the times at which they were taken.

        Up to `most`, and up to the one that makes them `TAKEN_BYTES` or more.
        """
        taken_bytes = 0
        for _ in range(min(most, self._left_to_take)):
            if taken_bytes >= TAKEN_BYTES:
                return
            frame = next(self._records)
            self._left_to_take -= 1
            taken_bytes += len(frame.payload)
            record = decode_unchecked(frame.payload)
            assert isinstance(record, Rollout | Tombstone)
            if frame.number in self._dead:
                record = Tombstone(frame.number, "train", "found among the dead letters")
            yield record, frame.taken

    def remove_file(self) -> None:
        """Remove the file, once the journal has all of its records again, durably."""
        self._path.unlink(missing_ok=True)

    def _collect(self, run_dir: Path, places: Sequence[JournalMark]) -> Iterator[RecordFrame]:
        """The unsettled records in the order in which they were first considered.

        What the file has from the resume before follows on the journal: the trainer was taking it.
        """
        seen = RangeSet()
        sources = [_journal(run_dir, place) for place in places]
        for source in (*sources, _read(recording.read_records(self._path), self._path)):
            for frame in source:
                if frame.number in self._settled or frame.number in seen:
                    continue
                if self._has_its_images(frame):
                    seen.add(frame.number)
                    yield frame

    def _has_its_images(self, frame: RecordFrame) -> bool:
        record = decode_unchecked(frame.payload)
        if not isinstance(record, Rollout):
            return True
        digests = sorted(images_of(record))
        return not digests or None not in self._images(digests)


def images_of(rollout: Rollout) -> set[str]:
    """The digests of all images that `rollout` names."""
    return {digest for sample in rollout.samples for digest in sample.images}


def _journal(run_dir: Path, place: JournalMark) -> Iterator[RecordFrame]:
    directory = run_dir / place.folder
    begin = recording.begin(directory)
    if begin > place.first:
        log.error(
            "the begin of the run's journal is missing; what it held is taken from redis, or "
            "issued again",
            path=str(directory),
            begins_at=begin,
            expected=place.first,
        )
    return _read(recording.records(directory, max(begin, place.first)), directory)


def _read(records: Iterator[RecordFrame], path: Path) -> Iterator[RecordFrame]:
    """`records` up to the first one that is damaged."""
    try:
        yield from records
    except RecordingError as error:
        log.error(
            "the run's journal cannot be read to its end; what it held is taken from redis, or "
            "issued again",
            path=str(path),
            problem=str(error),
        )
