"""The trainer's side of the journal: where it begins, and how it stays in step with checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from onstream.pipeline.images.feature_cache import FetchImages, no_images
from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.background_sync import BackgroundSync
from onstream.pipeline.run_files.durable import sync
from onstream.pipeline.run_files.ledger import Settled
from onstream.pipeline.run_files.recording import (
    JournalMark,
    Recorder,
    RecordFrame,
    ResumeMark,
    StepMark,
)
from onstream.pipeline.telemetry import get_logger
from onstream.settings.fields import known
from onstream.settings.paths import with_absolute_paths
from onstream.settings.root import Settings
from onstream.settings.toml import toml_text
from onstream.workers.trainer.durability.checkpoint import (
    STATE,
    Checkpoint,
    TrainerState,
    sync_tree,
)
from onstream.workers.trainer.durability.journal_writer import JournalWriter
from onstream.workers.trainer.durability.unsettled_records import UnsettledRecords, images_of

START = "start"
SETTINGS = "settings.toml"
MAY_CHANGE = ("trainer.max_steps", "trainer.optim.lr", "trainer.microbatch", "trainer.head_chunk")
"""Settings that a resume may change and that the bits of a step depend on."""
log = get_logger()


class Recording:
    """Journals a run from the checkpoint `found` on (None: its start).

    With `trainer.record` the journal is a recording, from which nothing is trimmed. Otherwise its
    segments go when neither the newest checkpoint nor the one before it needs them.

    One that the checkpoint knows goes on, cut back to the length that the checkpoint names: what
    was journalled later belongs to steps that will be taken again, and is in `unsettled`. One that
    the checkpoint does not know is set aside, and a new one begins with a copy of the checkpoint.

    Args:
        digest: of the weights that the trainer starts from.
        images: gives the bytes of images by digest.
        dead: numbers of dead letters.

    Raises:
        OSError: the disk is full.
    """

    def __init__(
        self,
        settings: Settings,
        found: Checkpoint | None,
        digest: str,
        images: FetchImages = no_images,
        dead: Collection[int] = (),
    ) -> None:
        self._images = images
        self._records = settings.trainer.record
        state = found.state if found else None
        folder = recording.FOLDER if self._records else recording.JOURNAL
        other = recording.JOURNAL if self._records else recording.FOLDER
        self._directory = settings.run_dir / folder
        place = place_of(settings.run_dir / folder, state)
        other_place = place_of(settings.run_dir / other, state)
        places = [one for one in (other_place, place) if one is not None]
        # Before anything is cut: Redis may not have these any more.
        self.unsettled = UnsettledRecords(settings.run_dir, state, places, images, dead)
        end = _end(self._directory, place)
        if end is None:
            _begin(self._directory, settings, found)
        self._recorder = Recorder(self._directory, end or 0)
        if other_place is not None:
            _end_other(settings.run_dir / other, other_place, state)
        step = state.step if state else 0
        values = {name: known()[name].value(settings) for name in MAY_CHANGE}
        self._recorder.mark(ResumeMark(step, digest, values, conditions(settings)), time.time())
        self._sync = BackgroundSync(self._recorder.sync)
        self._writer = JournalWriter(self._recorder, settings.run_dir)
        self._requested = self._recorder.position  # up to where the disk was asked to have it
        self._held: list[RecordFrame] | None = None
        self._settled_unwritten = set[int]()
        self._open: dict[int, int] = {}  # where the frame of each unsettled number begins
        self._needed_before = place.first if place and end is not None else 0
        self._all_again: int | None = None  # the position up to which `unsettled` is here again
        self._has_file = bool(self.unsettled.numbers)

    @property
    def mark(self) -> JournalMark:
        """What a checkpoint says of it."""
        end = self._recorder.position
        first = next(iter(self._open.values()), end)
        return JournalMark(self._directory.name, first, end)

    @property
    def recorded(self) -> int | None:
        """How long the recording is, in bytes; None where there is none."""
        return self._recorder.position if self._records else None

    @property
    def durable(self) -> int:
        """The position up to which it is durable.

        Raises:
            OSError: the disk failed.
        """
        return self._sync.durable

    @property
    def stalled(self) -> bool:
        """Whether frames wait for room on the disk."""
        return self._writer.stalled

    def record(self, record: Rollout | Tombstone, taken: float) -> None:
        """Put what the training considers behind the rest; `write` writes it.

        Raises:
            OSError: the disk is full.
        """
        if self._records and isinstance(record, Rollout):
            self._keep_images(record)
        frame = RecordFrame(record.number, taken, encode(record))
        if self._held is not None:
            self._held.append(frame)
        else:
            self._writer.add(frame)

    def hold(self) -> None:
        """Keep what comes in memory until `stepped`: it belongs behind a step just taken."""
        self._held = []

    def stepped(self, step: int, digest: str, metrics: dict[str, Any]) -> None:
        """Note that `step` was taken on the records so far, and what was held since behind it;
        `write` writes it.
        """
        self._writer.add(StepMark(step, digest, metrics))
        for frame in self._held or ():
            self._writer.add(frame)
        self._held = None

    def write(self) -> list[tuple[int, int]]:
        """Write what waits; returns each number that was written, and the position behind it.

        While the disk is full, it waits on, and is tried again by a later call.

        Raises:
            UserError: it stayed full.
        """
        written = self._writer.write()
        for number, start, _ in written:
            self.unsettled.numbers.discard(number)
            if number in self._settled_unwritten:
                self._settled_unwritten.remove(number)
            else:
                self._open[number] = start
        if self._has_file and not self.unsettled.numbers and self._all_again is None:
            self._all_again = self._recorder.position
        if self._recorder.position != self._requested:
            self._requested = self._recorder.position
            self._sync.request()
        return [(number, end) for number, _, end in written]

    def settle(self, settled: Iterable[Settled]) -> None:
        """Note what needs not be taken again by a trainer that resumes from the next checkpoint."""
        for line in settled:
            if self._open.pop(line.number, None) is None:
                self._settled_unwritten.add(line.number)

    def remove_unsettled(self) -> None:
        """Remove the file of `unsettled` once it has served."""
        if self._has_file and self._all_again is not None and self.durable >= self._all_again:
            self.unsettled.remove_file()
            self._has_file = False

    def sync(self) -> None:
        """Make it durable. The checkpoint that names its length comes after."""
        self._sync.now()

    def checkpoint_is_durable(self, mark: JournalMark) -> None:
        """Trim what neither this checkpoint, which holds `mark`, nor the one before it needs."""
        if not self._records:
            recording.trim(self._directory, self._needed_before)
        self._needed_before = mark.first

    def close(self) -> None:
        """End the thread, and close the file."""
        self._sync.close()
        self._recorder.close()

    def _keep_images(self, rollout: Rollout) -> None:
        digests = list(images_of(rollout))
        if not digests:
            return
        for digest, data in zip(digests, self._images(digests), strict=True):
            if data is not None:
                recording.save_image(self._directory, digest, data)


def conditions(settings: Settings) -> dict[str, Any]:
    """What the last bit of a sum may depend on beside the settings: processor, threads, library."""
    import torch
    import transformers

    from onstream.pipeline.models.loading import resolve_device

    device = resolve_device(settings.deployment.device)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def start_of(directory: Path) -> TrainerState | None:
    """The state of the checkpoint that a recording begins with; None where it begins the run."""
    state = directory / START / STATE
    return msgspec.json.decode(state.read_bytes(), type=TrainerState) if state.exists() else None


def place_of(directory: Path, state: TrainerState | None) -> JournalMark | None:
    """Where the journal in `directory` goes on for a trainer at the checkpoint `state`.

    None where the checkpoint knows none, or another one than is there.
    """
    if not directory.exists():
        return None
    start = start_of(directory)
    if state == start:
        return JournalMark(directory.name, 0, 0)  # it began here, and no checkpoint came since
    if state is None or (start is not None and state.sequence <= start.sequence):
        return None
    if state.journal is not None:
        return state.journal if state.journal.folder == directory.name else None
    if state.recorded is None or directory.name != recording.FOLDER:
        return None
    # A checkpoint of an earlier version: what that one had not settled is still in Redis.
    return JournalMark(directory.name, state.recorded, state.recorded)


def _end(directory: Path, place: JournalMark | None) -> int | None:
    """The length to which the journal in `directory` is cut; None where it cannot go on."""
    if place is None:
        return None
    have = recording.size_bytes(directory)
    if have < place.end:
        log.error(
            "the recording is shorter than the checkpoint remembers; a new one begins",
            path=str(directory),
            bytes=have,
            expected=place.end,
        )
        return None
    return place.end


def _end_other(directory: Path, place: JournalMark, state: TrainerState | None) -> None:
    """End the journal or recording in `directory`, in whose place another one has begun."""
    if directory.name == recording.JOURNAL:
        shutil.rmtree(directory)
        return
    recording.cut(directory, place.end)
    log.info("the recording ends here: trainer.record is off", step=state.step if state else 0)


def _begin(directory: Path, settings: Settings, found: Checkpoint | None) -> None:
    """Make an empty journal, and set a former one aside.

    A recording has all that its replay starts from; a journal has only what tells which checkpoint
    it begins with.
    """
    unfinished = directory.with_name(f".{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if directory.name == recording.FOLDER:
        text = toml_text(with_absolute_paths(settings))
        (unfinished / SETTINGS).write_text(text, encoding="utf-8")
        if found:
            shutil.copytree(found.path, unfinished / START, copy_function=_link)
    elif found:
        (unfinished / START).mkdir()
        shutil.copyfile(found.path / STATE, unfinished / START / STATE)
    sync_tree(unfinished)
    if directory.exists():
        _set_aside(directory)
    unfinished.rename(directory)
    sync(directory.parent)


def _set_aside(directory: Path) -> None:
    at = 1
    while (aside := directory.with_name(f"{directory.name}-{at}")).exists():
        at += 1
    directory.rename(aside)
    log.warning("a former recording of the run is set aside", kept_as=str(aside))


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links.

    A checkpoint is never written to again, so a second name is as good as a copy.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
