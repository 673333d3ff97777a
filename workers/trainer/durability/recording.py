"""The trainer's side of a recording: where it begins, and how it stays in step with checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from onstream.pipeline.images.feature_cache import FetchImages, no_images
from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.durable import sync
from onstream.pipeline.run_files.recording import Recorder, ResumeMark, StepMark
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

START = "start"
SETTINGS = "settings.toml"
MAY_CHANGE = ("trainer.max_steps", "trainer.optim.lr", "trainer.microbatch", "trainer.head_chunk")
"""Settings that a resume may change and that the bits of a step depend on."""
log = get_logger()


class Recording:
    """Records a run from the checkpoint `found` on (None: its start); nothing with it turned off.

    A recording that the checkpoint knows goes on, cut back to the length that the checkpoint names:
    what was recorded later belongs to steps that will be taken again. One that the checkpoint does
    not know is set aside, and a new one begins with a copy of the checkpoint.

    Args:
        digest: of the weights that the trainer starts from.
        images: gives the bytes of images by digest.

    Raises:
        OSError: the disk is full.
    """

    def __init__(
        self,
        settings: Settings,
        found: Checkpoint | None,
        digest: str,
        images: FetchImages = no_images,
    ) -> None:
        self._recorder: Recorder | None = None
        self._held: list[tuple[int, float, bytes]] | None = None
        self._images = images
        self._directory = settings.run_dir / recording.FOLDER
        length = _length(settings.run_dir, found)
        directory = self._directory
        if not settings.trainer.record:
            if length is not None and directory.exists():
                recording.cut(directory, length)
                log.info(
                    "the recording ends here: trainer.record is off",
                    step=found.state.step if found else 0,
                )
            return
        if length is None:
            _begin(directory, settings, found)
        self._recorder = Recorder(directory, length or 0)
        step = found.state.step if found else 0
        values = {name: known()[name].value(settings) for name in MAY_CHANGE}
        self._recorder.mark(ResumeMark(step, digest, values, conditions(settings)), time.time())

    @property
    def position(self) -> int | None:
        """How long the recording is, in bytes; None where there is none."""
        return self._recorder.position if self._recorder else None

    def record(self, record: Rollout | Tombstone, taken: float) -> None:
        """Record what the training considered, with the images that it shows.

        Raises:
            OSError: the disk is full.
        """
        if not self._recorder:
            return
        if isinstance(record, Rollout):
            self._keep_images(record)
        if self._held is not None:
            self._held.append((record.number, taken, encode(record)))
        else:
            self._recorder.record(record.number, taken, encode(record))

    def hold(self) -> None:
        """Keep what comes in memory until `stepped`: it belongs behind a step just taken."""
        self._held = []

    def stepped(self, step: int, digest: str, metrics: dict[str, Any]) -> None:
        """Record that `step` was taken on the records so far, then what was held since.

        Raises:
            OSError: the disk is full.
        """
        held = self._held or []
        self._held = None
        if self._recorder:
            self._recorder.mark(StepMark(step, digest, metrics), time.time())
            for record in held:
                self._recorder.record(*record)

    def sync(self) -> None:
        """Make it durable. The checkpoint that names its length comes after."""
        if self._recorder:
            self._recorder.sync()

    def close(self) -> None:
        """Close the file."""
        if self._recorder:
            self._recorder.close()

    def _keep_images(self, rollout: Rollout) -> None:
        digests = list({digest for sample in rollout.samples for digest in sample.images})
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


def _length(run_dir: Path, found: Checkpoint | None) -> int | None:
    """How many bytes of the recording are valid for the checkpoint `found`.

    None where the checkpoint knows no recording, or another one than is there.
    """
    directory = run_dir / recording.FOLDER
    start = start_of(directory)
    state = found.state if found else None
    if state == start and directory.exists():
        return 0  # it began here, and no checkpoint has been taken since
    if state is None or state.recorded is None:
        return None
    have = recording.size_bytes(directory)
    if have < state.recorded:
        log.error(
            "the recording is shorter than the checkpoint remembers; a new one begins",
            bytes=have,
            expected=state.recorded,
        )
        return None
    return state.recorded


def _begin(directory: Path, settings: Settings, found: Checkpoint | None) -> None:
    """Make an empty recording, with all that its replay starts from; set a former one aside."""
    unfinished = directory.with_name(f".{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    text = toml_text(with_absolute_paths(settings))
    (unfinished / SETTINGS).write_text(text, encoding="utf-8")
    if found:
        shutil.copytree(found.path, unfinished / START, copy_function=_link)
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
