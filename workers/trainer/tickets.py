"""Tickets: which to issue now, what is in each, and their issue.

A ticket is outstanding from its issue until its number settles. The window lets (1 +
max_off_policy_steps) batches be outstanding, so with 0 a batch is asked for only when the one
before it has been trained.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from onstream.pipeline.records import Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.telemetry import get_logger
from onstream.settings.stages import StageName, StreamName, stage_of, streams_of
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.teachers import AbsentTeachers

log = get_logger()

TICKETS_AT_ONCE = 512
RETRY_S = 0.05

IssueRequeued = Callable[[Sequence[Ticket], int, int], int]
"""Gives places of tickets, after so many issued and with such a backlog at most, to requeued
rollouts; returns how many tickets it issued so."""


@dataclass(frozen=True)
class TicketPlanner:
    """Plans tickets for a run of `max_steps` steps of `batch_size` rollouts.

    `teacher_of` gives the teacher of a problem by its index, where there are several.

    Pure: numbers in, tickets out. They come in whole groups of `group_size`. `requeued` gives the
    dead number for each number that is issued in place of one. A group with such a number asks what
    the dead one's group asked.
    """

    seed: int
    group_size: int
    batch_size: int
    max_off_policy_steps: int
    max_steps: int
    route: tuple[StageName, ...]
    requeued: dict[int, int] = field(default_factory=dict)
    teacher_of: Callable[[int], str] | None = None

    @property
    def window(self) -> int:
        """How many rollouts may be under way."""
        return (1 + self.max_off_policy_steps) * self.batch_size

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
        problem = self.problem(group)
        return Ticket(
            number=number,
            group=group,
            group_size=self.group_size,
            index=problem,
            seed=sampling_seed(self.seed, number),
            min_policy_version=min_policy_version,
            route=self._route(problem),
            requeued_from=self.requeued.get(number),
        )

    def _route(self, problem: int) -> list[StreamName]:
        """The route of rollouts of `problem`, by way of its teacher."""
        if self.teacher_of is None:
            return list(self.route)
        return list(streams_of(self.route, [self.teacher_of(problem)]))

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


class TicketIssuer:
    """Issues the tickets of a run, `issued` of which exist already.

    `streams` are the stages that rollouts pass: none is issued before each has been ready once.
    What is parked for a teacher of `absent` does not count in the window; where it is a window's
    worth, further problems of that teacher are passed over: their numbers settle as dead at once.
    `waits_for` says what holds up the next ticket, in words; empty where nothing does.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        planner: TicketPlanner,
        acknowledgements: Acknowledgements,
        *,
        issue_requeued: IssueRequeued,
        streams: Sequence[StreamName],
        max_backlog: int,
        issued: int,
        absent: AbsentTeachers | None = None,
    ) -> None:
        self._bus = bus
        self._absent = absent or AbsentTeachers(bus.state, ())
        self._lease = lease
        self.planner = planner
        self._issue_requeued = issue_requeued
        self._acknowledgements = acknowledgements
        self._max_backlog = max_backlog
        self.issued = issued
        bus.lease.required_stages = [stage for stage in streams if stage != "train"]
        self.opened = False
        """Whether all stages have been ready since this trainer started."""
        self.waits_for = "the stages of the route"
        self._next_try = 0.0
        self._lost: list[Ticket] = []

    @property
    def outstanding(self) -> int:
        """How many numbers were issued and have not settled."""
        return self.issued - len(self._acknowledgements.settled)

    def restore_count(self) -> None:
        """Bring the count in Redis and the trainer's own together, to the higher of them.

        Redis counts more after a kill: tickets were issued after the checkpoint. It counts fewer
        where it lost data; a count that fell would give numbers out twice.
        """
        counted = self._bus.state.issued()
        if counted < self.issued:
            log.error(
                "redis lost data: it counts fewer tickets than were issued",
                redis=counted,
                issued=self.issued,
            )
        self.issued = self._bus.lease.set_issued(self._lease, self.issued)
        self._bus.limits.note(issued=self.issued)

    def count_as_issued(self, numbers: Iterable[int]) -> None:
        """Count `numbers`, which the journal has, as issued: Redis may have lost its count.

        Tickets are issued in whole groups.
        """
        size = self.planner.group_size
        self.issued = max(self.issued, -(-max(numbers, default=0) // size) * size)

    def reissue(self, numbers: Iterable[int], step: int) -> None:
        """Issue lost `numbers` again, before anything else."""
        self._lost = self.planner.again(numbers, version=step)

    def issue(self, step: int) -> None:
        """Issue what is due after `step` steps, once the stages of the route are ready.

        Raises:
            LeaseLost: another trainer took over.
        """
        if time.monotonic() < self._next_try:
            return
        counted = max(0, self.outstanding - sum(self._absent.parked().values()))
        tickets = self.planner.due(version=step, issued=self.issued, outstanding=counted)
        if not (tickets or self._lost):
            return
        self.waits_for = ""
        self._issue_lost()
        if not self.waits_for:
            requeued = self._issue_requeued(tickets, self.issued, self._max_backlog)
            self.issued += requeued
            self._issue_new(tickets[requeued:])
        self._bus.limits.note(issued=self.issued)
        if self.waits_for:
            self._next_try = time.monotonic() + RETRY_S
        if not self._bus.lease.missing_stages:
            self.opened = True
            self._bus.lease.required_stages = ()

    def _issue_lost(self) -> None:
        while self._lost:
            some = self._lost[:TICKETS_AT_ONCE]
            # The token makes the call repeatable: Redis issues each of them once. The epoch is in
            # it because the same numbers may get lost a second time.
            token = f"{self._lease.epoch}/{some[0].number}"
            if not self._bus.lease.reissue(self._lease, token, some):
                self._wait_for("room in Redis for tickets that got lost")
                return
            self._lost = self._lost[TICKETS_AT_ONCE:]

    def _issue_new(self, tickets: Sequence[Ticket]) -> None:
        for some in self._parts(tickets):
            if not self._bus.lease.issue(self._lease, self.issued, some, self._max_backlog):
                reason = "the backlog is at orchestrator.max_backlog"
                if self._bus.lease.full:
                    reason = "Redis is full"
                self._wait_for(f"room for tickets: {reason}")
                return
            self.issued += len(some)

    def _parts(self, tickets: Sequence[Ticket]) -> Iterator[Sequence[Ticket | Tombstone]]:
        """`tickets` as they are issued together: those to write, or those that are passed over."""
        group_size = self.planner.group_size
        at_once = max(1, TICKETS_AT_ONCE // group_size) * group_size
        parked = self._absent.parked().items()
        full = {stream for stream, count in parked if count >= self.planner.window}
        for passed, together in groupby(tickets, lambda ticket: not full.isdisjoint(ticket.route)):
            some = list(together)
            for at in range(0, len(some), at_once):
                part = some[at : at + at_once]
                yield list(map(_passed_over, part)) if passed else part

    def _wait_for(self, what: str) -> None:
        """Note what the refused tickets wait for: stages that are not ready, or else `what`."""
        missing = self._bus.lease.missing_stages
        self.waits_for = f"{', '.join(missing)}: not ready yet" if missing else what


def _passed_over(ticket: Ticket) -> Tombstone:
    """What is issued in the place of `ticket`, whose teacher is away."""
    stream = next(stream for stream in ticket.route if stage_of(stream) == "score")
    return Tombstone(ticket.number, stream, f"passed over: {stream} is full, and nobody scores it")
