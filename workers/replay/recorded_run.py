"""Where a replay begins and what it is fed: the recording of a run, and the checkpoint it starts
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import Frame, Opened, Recorded
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.checkpoint import Checkpoint
from onstream.workers.trainer.durability.recording import SETTINGS, START, start_of
from onstream.workers.trainer.durability.settled_numbers import SettledNumbers


@dataclass(frozen=True)
class ReplayStart:
    """Where a replay begins: after `position` bytes of the recording, with the weights of `found`
    (None: the run's start).

    `held` are the records that the trainer had considered by then and not settled. `opened` says
    under which settings and conditions the next step was taken.
    """

    found: Checkpoint | None
    position: int
    held: list[Recorded]
    opened: Opened

    @property
    def step(self) -> int:
        """How many steps are taken already."""
        return self.found.state.step if self.found else 0


class RecordedRun:
    """The recording of the run in `run_dir`.

    Raises:
        UserError: there is none.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / recording.FOLDER
        if not recording.exists(self.directory):
            raise UserError(
                f"{run_dir} has no {recording.FOLDER}/",
                expected="a run that was recorded",
                next_step="Start it with trainer.record = true. A run that exists is recorded from its checkpoint on.",
            )
        start = self._start = start_of(self.directory)
        self._checkpoints = [
            found
            for found in checkpoint.complete(run_dir / checkpoint.FOLDER)
            if found.state.recorded is not None
            and (start is None or found.state.sequence > start.sequence)
        ]
        self.durable = max((found.state.recorded or 0 for found in self._checkpoints), default=0)

    @property
    def settings_file(self) -> Path:
        """The settings that the recording was begun with."""
        return self.directory / SETTINGS

    def beginning(self, before: int | None) -> ReplayStart:
        """The place of the newest checkpoint whose next steps lead to the step `before`; where the
        recording begins, for None.

        Raises:
            RecordingError: the recording is damaged before that place.
            UserError: the checkpoint is.
        """
        found = next(
            (
                found
                for found in self._checkpoints
                if before is not None and found.state.step < before
            ),
            None,
        )
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

    def frames(self, beginning: ReplayStart) -> Iterator[Frame]:
        """What follows `beginning`.

        Raises:
            RecordingError: the recording is damaged.
        """
        return recording.frames(self.directory, beginning.position, durable=self.durable)

    def checkpoint_of(self, step: int) -> Path | None:
        """The checkpoint that the recorded run has of `step`, if any."""
        return next((found.path for found in self._checkpoints if found.state.step == step), None)

    def _held_at(self, position: int, found: Checkpoint | None) -> tuple[list[Recorded], Opened]:
        settled = settled_in(found)
        held: list[Recorded] = []
        opened = None
        for frame in recording.frames(self.directory, end=position or None, durable=self.durable):
            if isinstance(frame, Opened):
                held = []
                opened = frame
                if not position:
                    break
            elif isinstance(frame, Recorded) and frame.number not in settled:
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
