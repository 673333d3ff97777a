"""A run that was recorded: its recording, its checkpoints, and where a replay can start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import Frame, RecordFrame, ResumeMark
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import SettledNumbers
from onstream.workers.trainer.durability.checkpoint import Checkpoint
from onstream.workers.trainer.durability.recording import SETTINGS, START, start_of


@dataclass(frozen=True)
class ReplayStart:
    """Where a replay starts.

    It goes on after `position` bytes of the recording, with the weights of the checkpoint `found`
    (None: the run's start). `held` are the records that the trainer had considered by then and not
    settled. `opened` says under which settings and conditions the next step was taken.
    """

    found: Checkpoint | None
    position: int
    held: list[RecordFrame]
    opened: ResumeMark

    @property
    def step(self) -> int:
        """How many steps are taken already."""
        return self.found.state.step if self.found else 0


class RecordedRun:
    """The run in `run_dir`, with its recording.

    Raises:
        UserError: it has none.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / recording.FOLDER
        if not recording.exists(self.directory):
            raise UserError(
                f"{run_dir} has no {recording.FOLDER}/",
                expected="a run that was recorded",
                next_step="Start it with trainer.record = true. "
                "A run that exists is recorded from its checkpoint on.",
            )
        self._start = start_of(self.directory)
        self._checkpoints = self._checkpoints_of_the_recording()
        lengths = (found.state.recorded or 0 for found in self._checkpoints)
        self.durable_bytes = max(lengths, default=0)

    @property
    def settings_file(self) -> Path:
        """The settings that the recording was begun with."""
        return self.directory / SETTINGS

    def start(self, before: int | None) -> ReplayStart:
        """The newest checkpoint before the step `before`; the recording's begin for None.

        Raises:
            RecordingError: the recording is damaged before that place.
            UserError: the checkpoint is damaged.
        """
        found = self._newest_before(before)
        position = (found.state.recorded or 0) if found else 0
        if found is None and self._start is not None:
            found = Checkpoint(self.directory / START, self._start)
        if found and (problem := checkpoint.damage(found.path)):
            raise UserError(
                f"{found.path}: {problem}",
                expected="a whole checkpoint",
                next_step="Give another --from-step, or none.",
            )
        held, opened = self._held_at(position, found)
        return ReplayStart(found, position, held, opened)

    def frames(self, start: ReplayStart) -> Iterator[Frame]:
        """What was recorded after `start`.

        Raises:
            RecordingError: the recording is damaged.
        """
        return recording.frames(self.directory, start.position, durable=self.durable_bytes)

    def checkpoint_of(self, step: int) -> Path | None:
        """The checkpoint that the recorded run has of `step`, if any."""
        return next((found.path for found in self._checkpoints if found.state.step == step), None)

    def _checkpoints_of_the_recording(self) -> list[Checkpoint]:
        """Checkpoints that name a length of this recording, the newest first.

        Not those older than its start: they may name a length of a former recording.
        """
        first = self._start.sequence if self._start else 0
        return [
            found
            for found in checkpoint.complete(self.run_dir / checkpoint.FOLDER)
            if found.state.recorded is not None and found.state.sequence > first
        ]

    def _newest_before(self, before: int | None) -> Checkpoint | None:
        if before is None:
            return None
        return next((found for found in self._checkpoints if found.state.step < before), None)

    def _held_at(
        self, position: int, found: Checkpoint | None
    ) -> tuple[list[RecordFrame], ResumeMark]:
        """What the trainer held after `position` bytes: considered, and not settled by `found`."""
        settled = settled_in(found)
        held: list[RecordFrame] = []
        opened = None
        for frame in recording.frames(
            self.directory, end=position or None, durable=self.durable_bytes
        ):
            if isinstance(frame, ResumeMark):
                held = []  # a trainer that resumes forgets what has not settled: it comes again
                opened = frame
                if not position:
                    break
            elif isinstance(frame, RecordFrame) and frame.number not in settled:
                held.append(frame)
        if opened is None:
            raise UserError(
                f"{self.directory} is empty",
                expected="a recorded step",
                next_step="Record the run for at least one step.",
            )
        return held, opened


def settled_in(found: Checkpoint | None) -> SettledNumbers:
    """The numbers whose fate the checkpoint `found` has fixed."""
    return SettledNumbers(found.state.settled if found else None)


def run_dir_of(given: Path) -> Path:
    """The run's directory meant by a directory, or by the name of a run under `runs`."""
    return next((path for path in (given, Path("runs") / given) if path.is_dir()), given)
