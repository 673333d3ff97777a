"""Plans tickets: which to issue now, and what is in each. Pure: numbers in, tickets out.

A ticket is outstanding from its issue until its number settles. The window lets (1 +
max_off_policy_steps) batches be outstanding, so with 0 a batch is asked for only when the one
before it has been trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from onstream.pipeline.records import StageName, Ticket


@dataclass(frozen=True)
class TicketPlanner:
    """Plans tickets for a run of `max_steps` steps of `batch_size` rollouts.

    They come in whole groups of `group_size`. `requeued` gives the dead number for each number that
    is issued in place of one. A group with such a number asks what the dead one's group asked.
    """

    seed: int
    group_size: int
    batch_size: int
    max_off_policy_steps: int
    max_steps: int
    route: tuple[StageName, ...]
    requeued: dict[int, int] = field(default_factory=dict)

    def due(self, *, version: int, issued: int, outstanding: int) -> list[Ticket]:
        """The tickets that there is room for after `version` steps, in whole groups.

        `issued` is the last number issued, `outstanding` how many numbers have not settled. The
        window closes towards the end of the run: nothing is asked for that no step would train.
        """
        steps = min(1 + self.max_off_policy_steps, self.max_steps - version)
        groups = -(-max(0, steps * self.batch_size - outstanding) // self.group_size)
        return [
            self.ticket(issued + 1 + ahead, self._min_version(version, outstanding + ahead))
            for ahead in range(groups * self.group_size)
        ]

    def again(self, numbers: Iterable[int], *, version: int) -> list[Ticket]:
        """The tickets of numbers that were issued and lost; any version not too old may write them.

        They are the same as before but for that version.
        """
        oldest = max(0, version - self.max_off_policy_steps)
        return [self.ticket(number, oldest) for number in numbers]

    def ticket(self, number: int, min_policy_version: int) -> Ticket:
        """The ticket of `number`. Its group, problem and seed follow from the number alone."""
        group = (number - 1) // self.group_size
        return Ticket(
            number=number,
            group=group,
            group_size=self.group_size,
            index=self.problem(group),
            seed=sampling_seed(self.seed, number),
            min_policy_version=min_policy_version,
            route=list(self.route),
            requeued_from=self.requeued.get(number),
        )

    def problem(self, group: int) -> int:
        """The index of the problem that `group` asks: its own, or that of the dead it replaces."""
        numbers = range(group * self.group_size + 1, (group + 1) * self.group_size + 1)
        dead = next((self.requeued[number] for number in numbers if number in self.requeued), None)
        return group if dead is None else self.problem((dead - 1) // self.group_size)

    def _min_version(self, version: int, ahead: int) -> int:
        """The oldest version that may write a rollout with `ahead` others in flight before it.

        A rollout of that version is fresh enough when its turn comes. Never a version still to
        come: the rollouts ahead may die, and then this one is what the next step waits for.
        """
        return max(0, version + min(0, ahead // self.batch_size - self.max_off_policy_steps))


def sampling_seed(run_seed: int, number: int) -> int:
    """63 bits from the run's seed and the number; neighbours share nothing."""
    digest = hashlib.blake2b(f"{run_seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
