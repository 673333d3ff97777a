"""Issues tickets: what got lost, what operators requeued, and what the window has room for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from onstream.pipeline.records import Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.telemetry import get_logger
from onstream.settings.stages import StageName
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.durability.operator_requests import OperatorRequestHandler
from onstream.workers.trainer.ticket_planner import TicketPlanner

log = get_logger()

TICKETS_AT_ONCE = 512
READY_POLL_S = 0.05


class TicketIssuer:
    """Issues the tickets of a run, `issued` of which exist already.

    `streams` are the stages that rollouts pass: none is issued before each has been ready once.
    `waits_for` says what holds up the next ticket, in words; empty where nothing does.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        planner: TicketPlanner,
        requests: OperatorRequestHandler,
        acknowledgements: Acknowledgements,
        *,
        streams: Sequence[StageName],
        max_backlog: int,
        issued: int,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self.planner = planner
        self._requests = requests
        self._acknowledgements = acknowledgements
        self._streams = streams
        self._max_backlog = max_backlog
        self.issued = issued
        self.opened = False
        """Whether all stages have been ready since this trainer started."""
        self.waits_for = "the stages of the route"
        self._next_poll = 0.0
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

    def reissue(self, numbers: Iterable[int], step: int) -> None:
        """Issue lost `numbers` again, before anything else."""
        self._lost = self.planner.again(numbers, version=step)

    def issue(self, step: int) -> None:
        """Issue what is due after `step` steps, once the stages of the route are ready.

        Raises:
            LeaseLost: another trainer took over.
        """
        tickets = self.planner.due(version=step, issued=self.issued, outstanding=self.outstanding)
        if not (tickets or self._lost) or not self._stages_ready():
            return
        self._issue_lost()
        requeued = self._requests.issue_requeued(tickets, self.issued, self._max_backlog)
        self.issued += requeued
        self._issue_new(tickets[requeued:])

    def _issue_lost(self) -> None:
        while self._lost:
            some = self._lost[:TICKETS_AT_ONCE]
            # The token makes the call repeatable: Redis issues each of them once. The epoch is in
            # it because the same numbers may get lost a second time.
            token = f"{self._lease.epoch}/{some[0].number}"
            if not self._bus.lease.reissue(self._lease, token, some):
                self.waits_for = "room in Redis for tickets that got lost"
                return
            self._lost = self._lost[TICKETS_AT_ONCE:]

    def _issue_new(self, tickets: Sequence[Ticket]) -> None:
        group_size = self.planner.group_size
        at_once = max(1, TICKETS_AT_ONCE // group_size) * group_size
        for at in range(0, len(tickets), at_once):
            some = tickets[at : at + at_once]
            if not self._bus.lease.issue(self._lease, self.issued, some, self._max_backlog):
                reason = "the backlog is at orchestrator.max_backlog"
                if self._bus.lease.full:
                    reason = "Redis is full"
                self.waits_for = f"room for tickets: {reason}"
                return
            self.issued += len(some)

    def _stages_ready(self) -> bool:
        """Whether nothing is waited for; Redis is asked now and then, not with every record."""
        if self.waits_for and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + READY_POLL_S
            ready = {*self._bus.state.ready_stages(), "train"}
            missing = [stage for stage in self._streams if stage not in ready]
            self.waits_for = f"{', '.join(missing)}: not ready yet" if missing else ""
            self.opened = self.opened or not missing
        return not self.waits_for
