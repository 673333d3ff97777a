"""The stage `train`, by which the worker loop drives the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onstream.pipeline.records import Rollout, Work
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.root import Settings
from onstream.settings.stages import StageName
from onstream.workers.trainer.trainer import Trainer
from onstream.workers.trainer.training import Training


class TrainerStage:
    """The stage `train`. It holds its entries: checkpoints acknowledge them, no hop moves them on.

    Consumes rollouts and tombstones. Waits for the stages of the route to be ready, then for a
    batch of complete units. Is unblocked by the entry that completes the last of them. Produces
    tickets, policy versions, checkpoints and metrics.
    """

    name: StageName = "train"
    holds_entries = True

    def __init__(
        self, settings: Settings, bus: Bus, start: Callable[[Settings, Bus, Stats], Trainer]
    ) -> None:
        self._settings = settings
        self._bus = bus
        self._start = start
        self._trainer: Trainer | None = None
        self.stats = Stats(detail="starting")

    def setup(self) -> None:
        """Become the run's trainer, resume it, and publish its weights.

        Raises:
            UserError: another trainer has the run, the settings are not the run's, the student
                cannot be loaded, or the disk is full.
        """
        self._trainer = self._start(self._settings, self._bus, self.stats)

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
        """Take `new` and do one slice of work.

        Returns outcomes for what it refuses alone: the other entries are held.

        Raises:
            LeaseLost: another trainer took over.
            UserError: the disk is full, and stayed so.
        """
        refused = []
        taken = []
        for delivery in new:
            if reason := self._objection(delivery.record):
                refused.append(Outcome(delivery, dead=reason))
            else:
                taken.append(delivery)
        self.trainer.handle(taken)
        self._update_stats()
        return refused

    def _objection(self, record: Work) -> str | None:
        """Why the reward of `record` cannot be trained on; None where it can."""
        verification = self._settings.orchestrator.verification
        least = verification.min_reward
        most = verification.max_reward
        reward = record.reward if isinstance(record, Rollout) else None
        if reward is None or least <= reward <= most:
            return None
        return (
            f"the reward is {reward:g}; expected {least:g} to {most:g} "
            "(orchestrator.verification.min_reward and max_reward)"
        )

    def close(self, *, finished: bool) -> None:
        """Checkpoint what is not durable yet, and close the files."""
        self.trainer.close()

    def _update_stats(self) -> None:
        """Put into the heartbeat what the trainer does or waits for."""
        self.stats.detail = status_text(self.trainer, self._settings.orchestrator.batch_size)
        # A new dictionary each time: the heartbeat's thread reads it while this one goes on.
        self.stats.numbers = self.trainer.numbers()


def status_text(trainer: Trainer, batch_size: int) -> str:
    """What `trainer` does or waits for, in words."""
    training = trainer.training
    if trainer.finished:
        return f"finished after step {training.step}"
    if trainer.tickets.waits_for:
        return f"waits for {trainer.tickets.waits_for}"
    if trainer.recording.stalled:
        return "waits for room on the disk for the run's journal, see the log"
    if trainer.checkpointing.stalled:
        return "waits for a checkpoint: none could be written, see the log"
    missing = training.batches.missing()
    more = "waits for rollouts"
    if missing:
        more = f"waits for {sum(missing.values())} more rollouts of {len(missing)} groups"
    step = f"step {training.step + 1} of {training.max_steps}"
    return f"{step}; {more}{_none_right(training, batch_size)}"


def _none_right(training: Training, batch_size: int) -> str:
    """A warning where a batch's worth of completions came and none was right enough to train on."""
    wrong = training.dropped["not_verified"]
    verified_alone = training.batches.rules.least_reward is not None
    if not verified_alone or training.batches.complete_units or wrong < batch_size:
        return ""
    return (
        f"; none of the {wrong} completions since the last step was right, "
        'and keep = "verified" trains on no others'
    )
