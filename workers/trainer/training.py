"""The training: what follows from the records in their order, and from nothing else.

A record is considered only when its turn comes: never while a batch waits to be trained. So a batch
is complete at one certain record, what is dropped counts in one certain step, and the same stream
gives the same weights and metrics, however it was cut into reads.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from msgspec.structs import replace

from onstream.pipeline.images.feature_cache import FeatureCache, FetchImages
from onstream.pipeline.models.forward import NO_IMAGES
from onstream.pipeline.models.loading import resolve_device
from onstream.pipeline.models.multimodal import Features
from onstream.pipeline.models.recompute import recomputes
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.records import Rollout, Timing, Tombstone
from onstream.pipeline.run_files.ledger import Fate, Settled
from onstream.pipeline.telemetry import get_logger, is_logged
from onstream.settings.root import Settings
from onstream.settings.sections.orchestrator import OrchestratorSettings
from onstream.workers.trainer.batches.batch_builder import (
    BatchBuilder,
    DroppedUnit,
    DropsInARow,
    TrainableUnit,
    TrainingRules,
    drop_metrics,
    rollout_metrics,
    scored_shares,
    unscored_reason,
)
from onstream.workers.trainer.batches.teacher_metrics import teacher_metrics
from onstream.workers.trainer.batches.train_samples import (
    SampleDecoder,
    TrainSample,
    training_samples,
    worst_rollouts,
)
from onstream.workers.trainer.durability.checkpoint import OPTIMIZER, Checkpoint
from onstream.workers.trainer.learner import LEARNER_METRICS, GradientNotFinite, Learner
from onstream.workers.trainer.losses.row_loss import PerSampleLosses

log = get_logger()

GiveUp = Callable[[Mapping[int, str]], None]
"""Hears of rollouts that are given up, with the reasons, by number."""

RIGHT = 1.0  # the reward of an answer that is right in every respect


@dataclass(frozen=True)
class TimedRecord:
    """A record as it came, and when it was taken, in seconds since the epoch."""

    record: Rollout | Tombstone
    taken: float


@dataclass(frozen=True)
class AdvanceResult:
    """What `Training.advance` did, in order: the records it considered, the numbers it settled.

    `refused` are the numbers of rollouts that no step could take, with the reasons.
    """

    considered: list[TimedRecord] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """A step that was taken: the units it trained on, the numbers it settled, and its metrics.

    `row` has the metrics that follow from the records alone, by their names in metrics.jsonl.
    """

    batch: list[TrainableUnit]
    settled: list[Settled]
    row: dict[str, Any]


class Training:
    """The training of one student, `step` steps after its start.

    It knows no files and no Redis. It returns what it considered and settled; the caller has to
    record the one and acknowledge the other.

    Args:
        worker: the name that the timings of its rollouts carry.
        dropped: counts, by fate, of what was dropped since the last step.
        images: gives the bytes of images by digest, where there are any.
    """

    def __init__(
        self,
        settings: Settings,
        learner: Learner,
        *,
        worker: str,
        step: int = 0,
        dropped: Mapping[str, int] | None = None,
        images: FetchImages | None = None,
    ) -> None:
        self.learner = learner
        self.step = step
        self.max_steps = settings.trainer.max_steps
        self._no_batches = partial(batch_builder, settings)
        self.batches = self._no_batches()
        self.batch: list[TrainableUnit] | None = None
        self.dropped: Counter[str] = Counter(dropped)
        self._dropped_in_all = Counter[str]()
        self._worker = worker
        self._decoder = SampleDecoder(
            group_size=settings.orchestrator.group_size,
            check=learner.check,
            ahead=learner.prepares_ahead,
        )
        self._most_bad = settings.trainer.max_bad_rollouts
        self._loss = settings.trainer.loss
        self._several_teachers = bool(settings.teachers)
        self._waiting: deque[TimedRecord] = deque()
        self._images: FeatureCache | None = None
        if learner.vision and images:
            self._images = FeatureCache(learner.vision, images, settings.images.keep_bytes)

    def take(self, record: Rollout | Tombstone, taken: float) -> None:
        """Put `record`, taken at `taken`, behind those that wait to be considered.

        No number may come twice.
        """
        self._waiting.append(TimedRecord(record, taken))
        if self._images and isinstance(record, Rollout):
            self._images.prefetch(digest for sample in record.samples for digest in sample.images)

    def close(self) -> None:
        """End the threads that decode, and fetch images."""
        self._decoder.close()
        if self._images:
            self._images.close()

    def advance(self) -> AdvanceResult:
        """Consider records until a batch is complete or none is left; drop what cannot train.

        The caller records what was considered before it takes the step: the batch depends on it.
        """
        result = AdvanceResult()
        while self.batch is None and self.step < self.max_steps:
            self._consider_up_to_a_batch(result)
            self._drop(result)
            self.batch = self.batches.batch(self.step)
            if not self._waiting:
                break
        return result

    def forget(self) -> None:
        """Forget every record that has not settled, as a trainer does that resumes a run.

        They come again.
        """
        self.batches = self._no_batches()
        self.batch = None
        self._waiting.clear()
        self._decoder.clear()

    def take_step(
        self, per_sample: PerSampleLosses | None = None, give_up: GiveUp = lambda reasons: None
    ) -> StepResult:
        """Take the step whose batch is complete; `per_sample` collects the losses of its samples.

        Where its gradient is not finite, it is tried once more without its worst rollouts, which
        settle as dead. Their numbers and the reasons go to `give_up` before that: whatever comes
        of the second try, no batch has them again. They follow from the batch alone, so a replay
        gives up the same.

        Raises:
            UserError: the gradient is not finite; the weights are as they were.
        """
        units = self.batch or []
        self.batch = None
        self._decode_next_batch()
        try:
            learned = self._learn(units, per_sample)
        except GradientNotFinite as error:
            units = self._without_worst(units, error, give_up)
            learned = self._learn(units, per_sample)
        settled = [line for unit in units for line in self._settle(unit)]
        batch = [unit for unit in units if unit.rollouts]
        row = {
            "step": self.step + 1,
            "policy_version": self.step + 1,
            **dict.fromkeys(LEARNER_METRICS),
            **learned,
            **rollout_metrics(batch, self.step),
            **drop_metrics(self.dropped),
            "scored_by": scored_shares(batch),
            "teachers": teacher_metrics(batch) if self._several_teachers else None,
            "unscored_reason": unscored_reason(batch),
        }
        self.step += 1
        self.dropped.clear()
        return StepResult(batch, settled, row)

    def _decode_next_batch(self) -> None:
        """Begin to decode what waits already for the batch after the one at hand."""
        size = self.batches.units_per_batch * self.batches.unit_size
        waiting = (timed.record for timed in self._waiting)
        rollouts = (record for record in waiting if isinstance(record, Rollout))
        self._decoder.begin(islice(rollouts, size))

    def _learn(
        self, batch: list[TrainableUnit], per_sample: PerSampleLosses | None
    ) -> dict[str, Any]:
        samples = self._samples(batch)
        features = self._features(samples)
        if per_sample:
            per_sample.clear()
        return self.learner.step(samples, self.max_steps, features=features, per_sample=per_sample)

    def _without_worst(
        self, batch: list[TrainableUnit], error: GradientNotFinite, give_up: GiveUp
    ) -> list[TrainableUnit]:
        """`batch` without the rollouts that spoiled its step.

        Raises:
            GradientNotFinite: `error`: none may be given up, or none would be left.
        """
        if not self._most_bad:
            raise error
        samples = self._samples(batch)
        losses = self.learner.sample_losses(samples, features=self._features(samples))
        worst = worst_rollouts(batch, losses, self._most_bad)
        step = self.step + 1
        give_up(
            {
                number: f"the gradient norm of step {step} was {error.norm}; the loss of this "
                f"rollout was {loss:g}, among the largest"
                for number, loss in worst.items()
            }
        )
        left = [unit.without(worst) for unit in batch]
        if not any(unit.rollouts for unit in left):
            raise error
        return left

    def _samples(self, batch: list[TrainableUnit]) -> list[TrainSample]:
        return training_samples(batch, self._decoder.samples, self._loss, version=self.step)

    def _features(self, samples: Sequence[TrainSample]) -> Features:
        """The images that `samples` show."""
        if self._images is None:
            return NO_IMAGES
        return self._images.get({digest for one in samples for digest in one.images})

    def _consider_up_to_a_batch(self, result: AdvanceResult) -> None:
        while self._waiting and self.batches.complete_units < self.batches.units_per_batch:
            timed = self._waiting.popleft()
            result.considered.append(timed)
            record = self._fit_to_train(timed)
            if isinstance(record, Tombstone) and isinstance(timed.record, Rollout):
                result.refused[record.number] = record.reason
            self.batches.add(record)

    def _fit_to_train(self, timed: TimedRecord) -> Rollout | Tombstone:
        """The record with its timing here, or a tombstone for a rollout that no step could take.

        Never the record itself changed: it is recorded as it came.
        """
        record = timed.record
        if isinstance(record, Tombstone):
            return record
        reason = self._decoder.problem(record) or self._image_problem(record)
        if reason:
            return Tombstone(record.number, "train", reason)
        timing = Timing("train", self._worker, timed.taken, timed.taken)
        return replace(record, timings=[*record.timings, timing])

    def _image_problem(self, record: Rollout) -> str | None:
        """Why a sample cannot be read with its images, in words; None where all are there."""
        if self._images is None:
            return None
        for sample in record.samples:
            prompt_ids = ids_array(sample.prompt_ids)
            completion_ids = ids_array(sample.completion_ids)
            problem = self._images.problem_with(prompt_ids, completion_ids, sample.images)
            if problem:
                return problem
        return None

    def _drop(self, result: AdvanceResult) -> None:
        for unit in self.batches.drop(self.step):
            result.settled.extend(self._settle(unit))
            fates = Counter[str](unit.dropped.values())
            fates["dead"] += len(unit.dead)
            for fate, count in fates.items():
                self._log_dropped(fate, count, unit.group)

    def _log_dropped(self, fate: str, count: int, group: int) -> None:
        """Count `count` rollouts of `group` that met `fate`, and log it now and then."""
        before = self._dropped_in_all[fate]
        self._dropped_in_all[fate] += count
        if is_logged(before, before + count):
            log.info("rollouts are dropped", reason=fate, so_far=before + count, group=group)

    def _settle(self, unit: TrainableUnit | DroppedUnit) -> list[Settled]:
        """Fix the fates of a unit's members in the step that is being gathered."""
        step = self.step + 1
        settled: list[Settled] = []
        if isinstance(unit, TrainableUnit):
            settled += [Settled(rollout.number, "trained", step) for rollout in unit.rollouts]
        fates: dict[int, Fate] = {**unit.dropped, **dict.fromkeys(unit.dead, "dead")}
        for number, fate in fates.items():
            if fate == "group_dead" and self.batches.unit_size == 1:
                fate = "dead"
            settled.append(Settled(number, fate, step))
            self.dropped[fate] += 1
        for line in settled:
            self._decoder.forget(line.number)
        return settled


def learner_at(settings: Settings, found: Checkpoint | None) -> Learner:
    """The learner as the checkpoint `found` has it, or at the start of the run.

    Raises:
        UserError: the student cannot be loaded.
    """
    # For an adapter's dropout. A checkpoint brings the random state that the run had come to.
    torch.manual_seed(settings.run.seed)
    device = resolve_device(settings.deployment.device)
    start = found.path if found else settings.model.name
    learner = Learner(
        start,
        settings.trainer,
        device,
        settings.model,
        recompute=recomputes(settings, start, device),
    )
    if found:
        state = torch.load(found.path / OPTIMIZER, map_location="cpu", weights_only=True)
        learner.load_state(state)
    return learner


def drops_in_a_row(orchestrator: OrchestratorSettings) -> DropsInARow:
    """Counts the drops of a run, up to as many as its settings allow."""
    groups = orchestrator.max_dropped_groups
    on_their_way = orchestrator.max_off_policy_steps * orchestrator.batch_size
    most = groups * orchestrator.group_size + on_their_way if groups else None
    return DropsInARow(most)


def batch_builder(settings: Settings) -> BatchBuilder:
    """Builds the batches of a run: says what a unit is, and what may train."""
    orchestrator = settings.orchestrator
    loss = settings.trainer.loss
    teacher = orchestrator.teacher_rollout_model
    verified_alone = teacher is not None and teacher.keep == "verified"
    rules = TrainingRules(
        max_staleness=orchestrator.max_off_policy_steps,
        train_unscored=loss.trains_unscored,
        least_reward=RIGHT if verified_alone else None,
    )
    return BatchBuilder(
        rules,
        group_size=orchestrator.group_size,
        batch_size=orchestrator.batch_size,
        unit=loss.unit,
    )
