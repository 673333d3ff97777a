"""Which rollouts train together, and which are dropped and why. Pure: records in, batches out, no clock and no torch.

A unit is a group of rollouts that share a problem, or one rollout where no reward has a baseline (`unit = "rollout"`).
A unit settles at the record that completes it. A batch is the next units in the order of settling, so the same stream
of records gives the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pipeline.records import Rollout, Tombstone
from workers.trainer.staleness import oldest_version

DropReason = Literal["stale", "not_verified", "group_dead"]


class DuplicateNumber(ValueError):
    """A number came twice; the caller keeps settled numbers from coming again."""


@dataclass
class Unit:
    """The members of one unit so far. `size` is how many it will have."""

    group: int
    size: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    tombstones: dict[int, Tombstone] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """The numbers that have come, in order."""
        return sorted([*self.rollouts, *self.tombstones])

    @property
    def settled(self) -> bool:
        """Whether every member has come, as a rollout or as a tombstone."""
        return len(self.rollouts) + len(self.tombstones) == self.size

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that wrote any token of any member; None where no policy wrote one."""
        versions = [oldest_version(rollout) for rollout in self.rollouts.values()]
        return min((version for version in versions if version is not None), default=None)

    def staleness(self, version: int) -> int:
        """Steps between `version`, whose weights would take the step, and the oldest that wrote; 0 where no policy wrote."""
        oldest = self.oldest_version
        return 0 if oldest is None else version - oldest


@dataclass(frozen=True)
class Chosen:
    """A unit that trains: its live rollouts by number, and the numbers that fell out of it."""

    group: int
    rollouts: tuple[Rollout, ...]
    staleness: int
    dropped: dict[int, DropReason]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Dropped:
    """A unit that does not train, number by number. Its place is filled by another, under new numbers."""

    group: int
    dropped: dict[int, DropReason]
    dead: tuple[int, ...]


class GroupBook:
    """Collects records into units and deals the settled ones out in batches.

    `max_staleness` is the staleness past which a unit is dropped. With `train_unscored` False, a rollout that has no
    reward is dropped as not verified, since nothing else would train it.
    """

    def __init__(
        self,
        *,
        group_size: int,
        batch_size: int,
        max_staleness: int,
        unit: Literal["group", "rollout"] = "group",
        train_unscored: bool = True,
    ) -> None:
        self.group_size = group_size
        self.units_per_batch = batch_size // group_size if unit == "group" else batch_size
        self.max_staleness = max_staleness
        self.unit = unit
        self.train_unscored = train_unscored
        self._open: dict[int, Unit] = {}
        self._settled: deque[Unit] = deque()
        self._chosen: list[Chosen] = []

    def add(self, record: Rollout | Tombstone) -> bool:
        """Takes a record in the order of the stream; True when it settles its unit.

        Raises:
            DuplicateNumber: the unit already holds this number.
        """
        raise NotImplementedError

    def drop(self, version: int) -> list[Dropped]:
        """Takes out the settled units that cannot train at `version`; each is returned once, to be replaced."""
        raise NotImplementedError

    def batch(self, version: int) -> list[Chosen] | None:
        """The next batch for the step that `version` takes, or None while too few units have settled.

        Call `drop(version)` first: what it returns makes room that must be filled again.
        """
        raise NotImplementedError

    def held(self) -> Iterator[int]:
        """Every number that came and was neither dealt out nor dropped."""
        raise NotImplementedError

    def missing(self) -> dict[int, int]:
        """For each open unit's group: how many members have not come."""
        raise NotImplementedError
