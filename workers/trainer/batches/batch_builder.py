"""Which rollouts train together, which are dropped and why, and the metrics of a batch.

Pure: records in, batches out, no clock and no torch. A unit is a group of rollouts that share a
problem, or one rollout where no reward needs a baseline (`unit = "rollout"`). A unit is complete at
the record of its last member. A batch is the next units in the order in which they became complete,
so the same stream of records gives the same batches.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Literal

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.run_files.ledger import Fate, Settled
from onstream.settings.stages import FIRST, STAGE_NAMES, WORK_STAGES, stage_of
from onstream.workers.trainer.maths.scalars import staleness

DropReason = Literal["stale", "not_verified", "group_dead"]
Metrics = dict[str, float | None]

REASONS_SHOWN = 3
NEXT_STEPS: dict[Fate, str] = {
    "not_verified": "Correct the scorer (task.scorer) or, where completions are cut off, raise "
    "inference.sampling.max_completion",
    "stale": "Start more or faster generators, or raise orchestrator.max_off_policy_steps",
    "dead": "`onstream dead list RUN` lists the reasons; mend what they name",
    "group_dead": "`onstream dead list RUN` lists the reasons; mend what they name",
}
"""What to do about the commonest fate."""

_LATENCIES = {stage: f"latency_{stage}_s" for stage in WORK_STAGES}
_QUEUES = {stage: f"queue_{stage}_s" for stage in STAGE_NAMES if stage != FIRST}


class DuplicateNumber(ValueError):
    """A number came twice; the caller keeps settled numbers from coming again."""


@dataclass(frozen=True)
class TrainableUnit:
    """A unit that trains: its live rollouts by number, and the numbers that do not."""

    group: int
    rollouts: tuple[Rollout, ...]
    staleness: int
    dropped: dict[int, DropReason]
    dead: tuple[int, ...]

    def without(self, numbers: Collection[int]) -> TrainableUnit:
        """The unit with those of `numbers` dead."""
        dead = [rollout.number for rollout in self.rollouts if rollout.number in numbers]
        live = tuple(rollout for rollout in self.rollouts if rollout.number not in numbers)
        return replace(self, rollouts=live, dead=(*self.dead, *dead))


@dataclass(frozen=True)
class DroppedUnit:
    """A unit that does not train, number by number.

    Another one, under new numbers, takes its place.
    """

    group: int
    dropped: dict[int, DropReason]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class TrainingRules:
    """What may train.

    A unit that is more than `max_staleness` versions old is dropped. With `train_unscored` False, a
    rollout without a reward is dropped as not verified, since nothing else would train it.
    `least_reward` keeps only the rollouts that reach it.
    """

    max_staleness: int
    train_unscored: bool = True
    least_reward: float | None = None

    def trains(self, rollout: Rollout) -> bool:
        """Whether anything trains a fresh rollout."""
        if self.least_reward is not None:
            return rollout.reward is not None and rollout.reward >= self.least_reward
        return rollout.reward is not None or self.train_unscored


@dataclass
class UnitMembers:
    """The members of one unit so far. `size` is how many it will have."""

    group: int
    size: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    tombstones: dict[int, Tombstone] = field(default_factory=dict)
    oldest: int | None = None  # the oldest policy version that wrote any token of a live member

    def add(self, record: Rollout | Tombstone) -> None:
        """Take the record of one member."""
        if isinstance(record, Tombstone):
            self.tombstones[record.number] = record
            return
        self.rollouts[record.number] = record
        versions = (self.oldest, oldest_version(record))
        self.oldest = min((one for one in versions if one is not None), default=None)

    @property
    def missing(self) -> int:
        """How many members have not come."""
        return self.size - len(self.rollouts) - len(self.tombstones)

    def decide(self, version: int, rules: TrainingRules) -> TrainableUnit | DroppedUnit:
        """What becomes of the complete unit in the step that `version` takes.

        A dead member leaves it and is not replaced; a unit with no live member, or none that
        anything trains, is. Too stale, it is dropped whole.
        """
        dead = tuple(sorted(self.tombstones))
        if not self.rollouts:
            return DroppedUnit(self.group, dict.fromkeys(dead, "group_dead"), ())
        age = staleness(self.oldest, version)
        if age > rules.max_staleness:
            return DroppedUnit(self.group, dict.fromkeys(sorted(self.rollouts), "stale"), dead)
        dropped: dict[int, DropReason] = {}
        live = []
        for number, rollout in sorted(self.rollouts.items()):
            if rules.trains(rollout):
                live.append(rollout)
            else:
                dropped[number] = "not_verified"
        if not live:
            return DroppedUnit(self.group, dropped, dead)
        return TrainableUnit(self.group, tuple(live), age, dropped, dead)


class BatchBuilder:
    """Collects records into units, and complete units into batches.

    `numbers` are those that came and were neither dropped nor put into a batch.

    Raises:
        ValueError: a batch would not be whole groups.
    """

    def __init__(
        self,
        rules: TrainingRules,
        *,
        group_size: int,
        batch_size: int,
        unit: Literal["group", "rollout"] = "group",
    ) -> None:
        if batch_size % group_size:
            raise ValueError(
                f"a batch of {batch_size} rollouts is not whole groups of {group_size}"
            )
        self.rules = rules
        self.unit_size = group_size if unit == "group" else 1
        self.units_per_batch = batch_size // self.unit_size
        self.numbers: set[int] = set()
        self._group_size = group_size
        self._incomplete: dict[int, UnitMembers] = {}  # by the place of the unit in the run
        self._complete: list[UnitMembers] = []  # in the order in which they became complete

    def add(self, record: Rollout | Tombstone) -> None:
        """Take a record, in the order of the stream.

        Raises:
            DuplicateNumber: the number is already here.
        """
        number = record.number
        if number in self.numbers:
            raise DuplicateNumber(f"number {number} came twice")
        self.numbers.add(number)
        place = (number - 1) // self.unit_size
        if place not in self._incomplete:
            group = (number - 1) // self._group_size
            self._incomplete[place] = UnitMembers(group, self.unit_size)
        unit = self._incomplete[place]
        unit.add(record)
        if not unit.missing:
            self._complete.append(self._incomplete.pop(place))

    def drop(self, version: int) -> list[DroppedUnit]:
        """Take out the complete units that cannot train at `version`.

        Each is returned once, to be replaced.
        """
        kept = []
        dropped = []
        for unit in self._complete:
            decision = unit.decide(version, self.rules)
            if isinstance(decision, DroppedUnit):
                dropped.append(decision)
            else:
                kept.append(unit)
        self._keep(kept)
        return dropped

    def batch(self, version: int) -> list[TrainableUnit] | None:
        """The next batch, for the step that `version` takes; None while too few units can train.

        Units that `drop(version)` would return are passed over and stay for it.
        """
        if len(self._complete) < self.units_per_batch:
            return None
        kept = []
        batch: list[TrainableUnit] = []
        for unit in self._complete:
            decision = unit.decide(version, self.rules)
            if isinstance(decision, TrainableUnit) and len(batch) < self.units_per_batch:
                batch.append(decision)
            else:
                kept.append(unit)
        if len(batch) < self.units_per_batch:
            return None
        self._keep(kept)
        return batch

    @property
    def complete_units(self) -> int:
        """Units that are complete and wait for a batch."""
        return len(self._complete)

    def missing(self) -> dict[int, int]:
        """For each group that is not complete: how many of its members have not come."""
        return {unit.group: unit.missing for unit in self._incomplete.values()}

    def _keep(self, complete: list[UnitMembers]) -> None:
        self._complete = complete
        self.numbers = {
            number
            for unit in (*self._incomplete.values(), *complete)
            for number in (*unit.rollouts, *unit.tombstones)
        }


def oldest_version(rollout: Rollout) -> int | None:
    """The oldest policy version that wrote any of the rollout's tokens; None where none did."""
    spans = (span for sample in rollout.samples for span in sample.version_spans)
    return min((span.version for span in spans), default=None)


def rollout_metrics(batch: Sequence[TrainableUnit], version: int) -> Metrics:
    """Means over the live rollouts of `batch`, trained with the weights of `version`.

    None where there is nothing to average.
    """
    rollouts = [rollout for unit in batch for rollout in unit.rollouts]
    ages = [staleness(oldest_version(rollout), version) for rollout in rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "rollouts": len(rollouts),
        "reward": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        "unscored": sum(rollout.unscored is not None for rollout in rollouts),
        "staleness_mean": fmean(ages),
        "staleness_max": max(ages),
        "completion_tokens_mean": fmean(map(_completion_tokens, rollouts)),
        "turns_mean": fmean(map(turns_of, rollouts)),
        "truncated_share": fmean(rollout.finish_reason == "length" for rollout in rollouts),
        **_times(rollouts),
    }


def scored_shares(batch: Sequence[TrainableUnit]) -> dict[str, float] | None:
    """The share of the rollouts of `batch` that each teacher scored, by the teacher's name.

    None where no teacher scored any.
    """
    rollouts = [rollout for unit in batch for rollout in unit.rollouts]
    counts = Counter(rollout.scored_by for rollout in rollouts if rollout.scored_by is not None)
    return {name: count / len(rollouts) for name, count in sorted(counts.items())} or None


def unscored_reason(batch: Sequence[TrainableUnit]) -> str | None:
    """The commonest reason why rollouts of `batch` have no reward; None where all have one."""
    rollouts = [rollout for unit in batch for rollout in unit.rollouts]
    reasons = Counter(rollout.unscored for rollout in rollouts if rollout.unscored is not None)
    return reasons.most_common(1)[0][0] if reasons else None


def drop_metrics(dropped: Mapping[str, int]) -> Metrics:
    """How many numbers settled untrained since the step before, from the counts by fate."""
    other = sum(count for fate, count in dropped.items() if fate not in ("stale", "dead"))
    return {
        "dropped_stale": dropped.get("stale", 0),
        "dropped_other": other,
        "dead": dropped.get("dead", 0),
    }


def turns_of(rollout: Rollout) -> int:
    """How many turns the policy wrote: stretches of the loss mask, with others' tokens between."""
    masks = [sample.loss_mask for sample in rollout.samples]
    return sum(mask.startswith(b"\1") + mask.count(b"\0\1") for mask in masks)


def _completion_tokens(rollout: Rollout) -> int:
    return sum(len(sample.loss_mask) for sample in rollout.samples)


def _times(rollouts: Iterable[Rollout]) -> Metrics:
    """Mean seconds that the rollouts spent in each stage, and waiting in the stream before it."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        for timing in rollout.timings:
            if name := _LATENCIES.get(stage_of(timing.stage)):
                spent[name].append(timing.done - timing.taken)
        for earlier, later in pairwise(rollout.timings):
            if name := _QUEUES.get(stage_of(later.stage)):
                # Clocks of two machines differ: a wait may come out below zero.
                spent[name].append(max(0.0, later.taken - earlier.done))
    names = (*_LATENCIES.values(), *_QUEUES.values())
    return {name: fmean(spent[name]) if name in spent else None for name in names}


class DropsInARow:
    """Counts the rollouts that were dropped since the last one that could train, and why.

    A whole answer that was scored and is not right counts as neither: `keep = "verified"` is there
    to leave such out, however many they are.
    """

    def __init__(self, most: int | None) -> None:
        """`most` rollouts in a row make a problem; None: none ever do."""
        self._most = most
        self._reasons: dict[int, str | None] = {}  # of numbers that have not settled
        self._dropped = Counter[tuple[Fate, str]]()

    def consider(self, records: Iterable[Rollout | Tombstone]) -> None:
        """Note what may become the reason of each of `records`, whose fates are open."""
        for record in records:
            self._reasons[record.number] = _reason(record)

    def settle(self, settled: Sequence[Settled], *, can_train: bool) -> None:
        """Count what has settled; `can_train` says that a rollout trains, or waits for a batch."""
        for line in settled:
            reason = self._reasons.pop(line.number, "")
            filtered_out = line.fate == "not_verified" and reason is None
            if line.fate != "trained" and not filtered_out:
                self._dropped[line.fate, reason or ""] += 1
        if can_train:
            self._dropped.clear()

    @property
    def problem(self) -> UserError | None:
        """What to stop the run with; None while it may go on."""
        count = self._dropped.total()
        if self._most is None or count < self._most:
            return None
        (fate, _), _ = self._dropped.most_common(1)[0]
        return UserError(
            f"none of the last {count} rollouts could be trained on: {self._in_words()}",
            expected="rollouts that can train",
            next_step=f"{NEXT_STEPS.get(fate, 'Mend that')}, and start the run again: it goes on. "
            "orchestrator.max_dropped_groups says how many groups may be dropped in a row.",
            exit=Exit.REFUSED,
        )

    def _in_words(self) -> str:
        words = []
        for (fate, reason), count in self._dropped.most_common(REASONS_SHOWN):
            words.append(f"{count} {fate} ({reason})" if reason else f"{count} {fate}")
        return ", ".join(words)


def _reason(record: Rollout | Tombstone) -> str | None:
    """Why `record` would be dropped; None where that would be no fault of the run."""
    if isinstance(record, Tombstone):
        return record.reason
    if record.unscored is not None:
        return f"unscored: {record.unscored}"
    if record.finish_reason == "length":
        return "completions cut off"
    return None
