"""The stage `train`, as the worker loop drives it: a thin shell around the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.root import Settings
from onstream.settings.stages import StageName
from onstream.workers.trainer.start import start_trainer
from onstream.workers.trainer.trainer import Trainer


class TrainerStage:
    """The stage `train`. It holds its entries: checkpoints acknowledge them, no hop moves them on.

    Consumes rollouts and tombstones. Waits for the stages of the route to be ready, then for a
    batch of complete units. Is unblocked by the entry that completes the last of them. Produces
    tickets, policy versions, checkpoints and metrics.
    """

    name: StageName = "train"
    holds_entries = True

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self._settings = settings
        self._bus = bus
        self._trainer: Trainer | None = None
        self.stats = Stats(detail="starting")

    def setup(self) -> None:
        """Become the run's trainer, resume it, and publish its weights.

        Raises:
            UserError: another trainer has the run, the settings are not the run's, the student
                cannot be loaded, or the disk is full.
        """
        self._trainer = start_trainer(self._settings, self._bus, self.stats)

    @property
    def trainer(self) -> Trainer:
        """The trainer at work, after `setup`."""
        assert self._trainer is not None, "setup() comes first"
        return self._trainer

    @property
    def room(self) -> int:
        """How many more records the trainer wants now."""
        return self.trainer.room

    @property
    def busy(self) -> bool:
        """Whether a batch waits to be trained."""
        return self.trainer.busy

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Take `new` and do one slice of work. Returns no outcomes: entries are held.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so.
        """
        self.trainer.handle(new)
        return []

    def close(self, *, finished: bool) -> None:
        """Checkpoint what is not durable yet, and close the files."""
        self.trainer.close()
