"""The training: what follows from the records in their order, and from nothing else.

A record is considered only when its turn comes: never while a batch waits to be trained. So a batch
is complete at one certain record, what is dropped counts in one certain step, and the same stream
gives the same weights and metrics, however it was cut into reads.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch

from onstream.pipeline.images.feed import Fetch, ImageFeed
from onstream.pipeline.models.loading import resolve_device
from onstream.pipeline.models.logprobs import NO_IMAGES
from onstream.pipeline.records import Rollout, Timing, Tombstone, ids_array
from onstream.pipeline.run_files.ledger import Fate
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.trainer.batches.batch_builder import BatchBuilder, DroppedUnit, TrainableUnit
from onstream.workers.trainer.batches.rollout_metrics import (
    LEARNER_METRICS,
    drop_metrics,
    rollout_metrics,
    scored_shares,
)
from onstream.workers.trainer.batches.to_samples import flaw, training_samples
from onstream.workers.trainer.durability.checkpoint import OPTIMIZER, Checkpoint
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.maths.per_sample_losses import PerSampleLosses

log = get_logger()

RIGHT = 1.0  # the reward of an answer that is right in every respect


class Surroundings(Protocol):
    """What a training tells of itself while it goes."""

    def considered(self, record: Rollout | Tombstone, taken: float) -> None:
        """`record`, as it came, is the next one that the training depends on; it was taken at
        `taken`, seconds since the epoch.
        """
        ...

    def settle(self, numbers: Iterable[int], fate: Fate, step: int) -> None:
        """The fate of `numbers` is fixed, in `step`."""
        ...


@dataclass(frozen=True)
class StepResult:
    """A step that the learner took: the units it trained on, and its metrics."""

    batch: list[TrainableUnit]
    metrics: dict[str, Any]


class Training:
    """The training of one student, `step` steps from its start. `worker` is the name that its
    timings carry.

    `dropped` counts, by fate, what was dropped since the last step. `images` gives the bytes of
    images by digest, where there are any.
    """

    def __init__(
        self,
        settings: Settings,
        learner: Learner,
        around: Surroundings,
        *,
        worker: str,
        step: int = 0,
        dropped: Mapping[str, int] | None = None,
        images: Fetch | None = None,
    ) -> None:
        self.learner = learner
        self.step = step
        self.max_steps = settings.trainer.max_steps
        self._no_batches = partial(batch_builder, settings)
        self.batches = self._no_batches()
        self.batch: list[TrainableUnit] | None = None
        self.dropped: Counter[str] = Counter(dropped)
        self._around = around
        self._worker = worker
        self._group_size = settings.orchestrator.group_size
        self._normalize = settings.trainer.loss.normalize_advantage
        self._waiting: deque[tuple[Rollout | Tombstone, float]] = deque()
        self._feed = (
            ImageFeed(learner.vision, images, settings.images.keep_bytes)
            if learner.vision and images
            else None
        )

    def take(self, record: Rollout | Tombstone, taken: float) -> None:
        """Put `record`, taken at `taken`, behind those that wait to be considered. No number may
        come twice.
        """
        self._waiting.append((record, taken))
        if self._feed and isinstance(record, Rollout):
            self._feed.ahead(digest for sample in record.samples for digest in sample.images)

    def close(self) -> None:
        """End what looks ahead."""
        if self._feed:
            self._feed.close()

    def advance(self) -> None:
        """Consider records, drop what cannot train, until a batch is complete or no record is left."""
        while self.batch is None and self.step < self.max_steps:
            while self._waiting and self.batches.complete_units < self.batches.units_per_batch:
                self._consider(*self._waiting.popleft())
            for unit in self.batches.drop(self.step):
                self._settle(unit)
                log.info(
                    "dropped",
                    group=unit.group,
                    reasons=dict(Counter(unit.dropped.values())),
                    dead=len(unit.dead),
                )
            self.batch = self.batches.batch(self.step)
            if not self._waiting:
                return

    def forget(self) -> None:
        """Forget every record that has not settled, as a trainer does that takes a run up: they
        come again.
        """
        self.batches = self._no_batches()
        self.batch = None
        self._waiting.clear()

    def learn(self, per_sample: PerSampleLosses | None = None) -> StepResult:
        """Take the step that the batch is complete for; `per_sample` collects its samples' losses.

        Raises:
            UserError: the gradient is not finite; the weights are as they were.
        """
        batch = self.batch or []
        self.batch = None
        samples = training_samples(batch, normalize=self._normalize, version=self.step)
        shown = {digest for sample in samples for digest in sample.images}
        features = self._feed.of(shown) if self._feed else NO_IMAGES
        return StepResult(
            batch,
            self.learner.step(samples, self.max_steps, features=features, per_sample=per_sample),
        )

    def conclude(self, learned: StepResult) -> dict[str, Any]:
        """Settle what `learned` trained on and count the step; returns its row of metrics, as far
        as it follows from the records.
        """
        for unit in learned.batch:
            self._settle(unit)
        row = {
            "step": self.step + 1,
            "policy_version": self.step + 1,
            **dict.fromkeys(LEARNER_METRICS),
            **learned.metrics,
            **rollout_metrics(learned.batch, self.step),
            **drop_metrics(self.dropped),
            "scored_by": scored_shares(learned.batch),
        }
        self.step += 1
        self.dropped.clear()
        return row

    def _consider(self, record: Rollout | Tombstone, taken: float) -> None:
        self._around.considered(record, taken)
        if isinstance(record, Rollout):
            if reason := flaw(
                record, group_size=self._group_size, check=self.learner.check
            ) or self._unseen(record):
                log.error(
                    "a rollout cannot be trained on; it counts as dead",
                    number=record.number,
                    reason=reason,
                )
                record = Tombstone(record.number, "train", reason)
            else:
                record.timings = [*record.timings, Timing("train", self._worker, taken, taken)]
        self.batches.add(record)

    def _unseen(self, record: Rollout) -> str | None:
        """Why the images of `record` cannot be trained on, in words; None where they all are there."""
        if self._feed is None:
            return None
        samples = (
            (ids_array(sample.prompt_ids), ids_array(sample.completion_ids), sample.images)
            for sample in record.samples
        )
        reasons = (self._feed.objection(*sample) for sample in samples)
        return next((reason for reason in reasons if reason), None)

    def _settle(self, unit: TrainableUnit | DroppedUnit) -> None:
        """Fix the fates of a unit's members in the step that is being gathered."""
        fates: dict[int, Fate] = {**unit.dropped, **dict.fromkeys(unit.dead, "dead")}
        if isinstance(unit, TrainableUnit):
            self._around.settle(
                (rollout.number for rollout in unit.rollouts), "trained", self.step + 1
            )
        for number, fate in fates.items():
            if fate == "group_dead" and self.batches.unit_size == 1:
                fate = "dead"
            self._around.settle([number], fate, self.step + 1)
            self.dropped[fate] += 1


def learner_at(settings: Settings, found: Checkpoint | None) -> Learner:
    """The learner as the checkpoint `found` has it, or at the start of the run.

    Raises:
        UserError: the student cannot be loaded.
    """
    torch.manual_seed(
        settings.run.seed
    )  # of an adapter's dropout; a checkpoint brings the state it had come to
    device = resolve_device(settings.deployment.device)
    learner = Learner(found.path if found else settings.model.name, settings.trainer, device)
    if found:
        learner.load_state(
            torch.load(found.path / OPTIMIZER, map_location="cpu", weights_only=True)
        )
    return learner


def batch_builder(settings: Settings) -> BatchBuilder:
    """The empty book of a run: what its units are, and which of them train."""
    orchestrator = settings.orchestrator
    loss = settings.trainer.loss
    supervised = loss.type == "sft"
    source = orchestrator.teacher_rollout_model
    unit: Literal["group", "rollout"] = "rollout" if supervised or loss.adv_tau == 0 else "group"
    return BatchBuilder(
        group_size=orchestrator.group_size,
        batch_size=orchestrator.batch_size,
        max_staleness=orchestrator.max_off_policy_steps,
        unit=unit,
        train_unscored=supervised or loss.teacher_tau > 0,
        least_reward=RIGHT if source is not None and source.keep == "verified" else None,
    )
