"""Which rollouts train together, and which are dropped and why. Pure: records in, batches out, no
clock and no torch.

A unit is a group of rollouts that share a problem, or one rollout where no reward needs a baseline
(`unit = "rollout"`). A unit settles at the record that completes it. A batch is the next units in
the order of settling, so the same stream of records gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from onstream.pipeline.records import Rollout, Tombstone
from onstream.workers.trainer.maths.staleness import staleness

DropReason = Literal["stale", "not_verified", "group_dead"]


class DuplicateNumber(ValueError):
    """A number came twice; the caller keeps settled numbers from coming again."""


@dataclass(frozen=True)
class TrainableUnit:
    """A unit that trains: its live rollouts by number, and the numbers that fell out of it."""

    group: int
    rollouts: tuple[Rollout, ...]
    staleness: int
    dropped: dict[int, DropReason]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class DroppedUnit:
    """A unit that does not train, number by number. Another one, under new numbers, takes its
    place.
    """

    group: int
    dropped: dict[int, DropReason]
    dead: tuple[int, ...]


@dataclass
class UnitMembers:
    """The members of one unit so far. `size` is how many it will have."""

    group: int
    size: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    tombstones: dict[int, Tombstone] = field(default_factory=dict)
    oldest: int | None = None  # the oldest policy version that wrote any token of a live member

    def add(self, record: Rollout | Tombstone) -> None:
        """Takes the record of one member."""
        if isinstance(record, Tombstone):
            self.tombstones[record.number] = record
            return
        self.rollouts[record.number] = record
        versions = [
            version for version in (self.oldest, oldest_version(record)) if version is not None
        ]
        self.oldest = min(versions, default=None)

    @property
    def missing(self) -> int:
        """How many members have not come."""
        return self.size - len(self.rollouts) - len(self.tombstones)

    def judge(
        self,
        version: int,
        *,
        max_staleness: int,
        train_unscored: bool,
        least_reward: float | None = None,
    ) -> TrainableUnit | DroppedUnit:
        """What becomes of the settled unit in the step that `version` takes.

        A dead member leaves it and is not replaced; a unit with no live member, or none that
        anything trains, is. Too stale, it is dropped whole. A member below `least_reward`, or
        without a reward to reach it, leaves as well.
        """
        dead = tuple(sorted(self.tombstones))
        if not self.rollouts:
            return DroppedUnit(self.group, dict.fromkeys(dead, "group_dead"), ())
        age = staleness(self.oldest, version)
        if age > max_staleness:
            return DroppedUnit(self.group, dict.fromkeys(sorted(self.rollouts), "stale"), dead)
        idle = sorted(
            number
            for number, rollout in self.rollouts.items()
            if not _trains(rollout.reward, train_unscored, least_reward)
        )
        live = tuple(
            self.rollouts[number] for number in sorted(self.rollouts) if number not in idle
        )
        dropped: dict[int, DropReason] = dict.fromkeys(idle, "not_verified")
        return (
            TrainableUnit(self.group, live, age, dropped, dead)
            if live
            else DroppedUnit(self.group, dropped, dead)
        )


def _trains(reward: float | None, train_unscored: bool, least_reward: float | None) -> bool:
    if least_reward is not None:
        return reward is not None and reward >= least_reward
    return reward is not None or train_unscored


class BatchBuilder:
    """Collects records into units and deals the settled ones out in batches.

    `max_staleness` is the staleness past which a unit is dropped. With `train_unscored` False, a
    rollout that has no reward is dropped as not verified, since nothing else would train it.
    `least_reward` keeps only the rollouts that reach it.

    Raises:
        ValueError: a batch would not be whole groups.
    """

    def __init__(
        self,
        *,
        group_size: int,
        batch_size: int,
        max_staleness: int,
        unit: Literal["group", "rollout"] = "group",
        train_unscored: bool = True,
        least_reward: float | None = None,
    ) -> None:
        if batch_size % group_size:
            raise ValueError(
                f"a batch of {batch_size} rollouts is not whole groups of {group_size}"
            )
        self.unit_size = group_size if unit == "group" else 1
        self.units_per_batch = batch_size // self.unit_size
        self.max_staleness = max_staleness
        self.train_unscored = train_unscored
        self.least_reward = least_reward
        self._group_size = group_size
        self._open: dict[int, UnitMembers] = {}  # by the place of the unit in the run
        self._settled: list[UnitMembers] = []  # in the order of settling
        self._numbers: set[int] = set()

    def add(self, record: Rollout | Tombstone) -> bool:
        """Takes a record, in the order of the stream; True when it settles its unit.

        Raises:
            DuplicateNumber: the number is already here.
        """
        if record.number in self._numbers:
            raise DuplicateNumber(f"number {record.number} came twice")
        self._numbers.add(record.number)
        place = (record.number - 1) // self.unit_size
        unit = self._open.setdefault(
            place, UnitMembers((record.number - 1) // self._group_size, self.unit_size)
        )
        unit.add(record)
        if unit.missing:
            return False
        self._settled.append(self._open.pop(place))
        return True

    def drop(self, version: int) -> list[DroppedUnit]:
        """Takes out the settled units that cannot train at `version`; each is returned once, to be
        replaced.
        """
        judged = [(unit, self._judge(unit, version)) for unit in self._settled]
        self._keep([unit for unit, verdict in judged if isinstance(verdict, TrainableUnit)])
        return [verdict for _, verdict in judged if isinstance(verdict, DroppedUnit)]

    def batch(self, version: int) -> list[TrainableUnit] | None:
        """The next batch, for the step that `version` takes, or None while too few units that can
        train have settled.

        Units that `drop(version)` would return are passed over and stay for it.
        """
        if len(self._settled) < self.units_per_batch:
            return None
        judged = [(unit, self._judge(unit, version)) for unit in self._settled]
        dealt = [(unit, verdict) for unit, verdict in judged if isinstance(verdict, TrainableUnit)][
            : self.units_per_batch
        ]
        if len(dealt) < self.units_per_batch:
            return None
        taken = {id(unit) for unit, _ in dealt}
        self._keep([unit for unit in self._settled if id(unit) not in taken])
        return [verdict for _, verdict in dealt]

    def _judge(self, unit: UnitMembers, version: int) -> TrainableUnit | DroppedUnit:
        return unit.judge(
            version,
            max_staleness=self.max_staleness,
            train_unscored=self.train_unscored,
            least_reward=self.least_reward,
        )

    def _keep(self, settled: list[UnitMembers]) -> None:
        self._settled = settled
        self._numbers = {
            number
            for unit in (*self._open.values(), *settled)
            for number in (*unit.rollouts, *unit.tombstones)
        }

    def held(self) -> Iterator[int]:
        """Every number that came and was neither dealt out nor dropped, in order."""
        return iter(sorted(self._numbers))

    @property
    def complete_units(self) -> int:
        """Units that have settled and wait for a batch."""
        return len(self._settled)

    def missing(self) -> dict[int, int]:
        """For each group that has not settled: how many of its members have not come."""
        return {unit.group: unit.missing for unit in self._open.values()}


def oldest_version(rollout: Rollout) -> int | None:
    """The oldest policy version that wrote a token of `rollout`; None where no policy wrote one."""
    versions = [span.version for sample in rollout.samples for span in sample.version_spans]
    return min(versions, default=None)
