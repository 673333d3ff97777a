"""Serves operators: requeues dead rollouts under new numbers, and purges dead letters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onstream.pipeline.records import Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import FILE, forget_spilled, spill_dead
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.operator_requests import OperatorRequest
from onstream.pipeline.telemetry import get_logger
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.tickets import TicketPlanner

log = get_logger()

POLL_S = 1.0


class OperatorRequestHandler:
    """The operators' requests of one run, as its trainer serves them.

    A request waits until its number has settled: only then is it certain to be dead. A requeue
    takes the place of the next new group in the window. A purge deletes its letter once a
    checkpoint records it.

    `planner.requeued` is changed here, and is the dictionary that the next checkpoint holds. Redis
    has the same in a hash, written by the script that issues the tickets: a kill before the
    checkpoint loses no requeued number.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        run_dir: Path,
        acknowledgements: Acknowledgements,
        planner: TicketPlanner,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._dead_file = run_dir / FILE
        self._acknowledgements = acknowledgements
        self._planner = planner
        self._requeues: dict[int, list[OperatorRequest]] = {}  # by the group of the dead
        self._purges: list[OperatorRequest] = []  # acknowledged as purged, in no checkpoint yet
        self._purges_written: list[OperatorRequest] = []  # of those, in the one under way
        self._accepted: set[bytes] = set()
        self._next_poll = 0.0

    def restore_requeued(self) -> None:
        """Bring together what the checkpoint and Redis know of requeued numbers.

        Redis may have lost some, and may know of some that were requeued after the checkpoint.
        """
        in_redis = self._bus.requests.requeued()
        ours = self._planner.requeued
        missing = {new: dead for new, dead in ours.items() if new not in in_redis}
        self._bus.requests.restore_requeued(self._lease, missing)
        ours.update(in_redis)

    def poll(self, step: int) -> None:
        """Accept or refuse new requests, now and then; `step` is the step that is being gathered.

        Raises:
            LeaseLost: another trainer took over.
        """
        if time.monotonic() < self._next_poll:
            return
        self._next_poll = time.monotonic() + POLL_S
        issued = self._bus.state.issued()
        requests = list(self._bus.requests.waiting())
        self._accepted.intersection_update(request.id for request in requests)
        refused = []
        for request in requests:
            if request.id in self._accepted or self._not_settled(request.number, issued):
                continue
            if reason := self._accept(request, step):
                log.warning(
                    "a request was refused",
                    request=request.kind,
                    number=request.number,
                    reason=reason,
                )
                refused.append(request)
        self._bus.requests.close(self._lease, refused)

    def issue_requeued(self, tickets: Sequence[Ticket], issued: int, max_backlog: int) -> int:
        """Give the places of the first groups in `tickets` to requeued rollouts.

        A group with a requeued number asks the problem of the dead one's group. Returns how many
        tickets were issued so.

        Raises:
            LeaseLost: another trainer took over.
        """
        size = self._planner.group_size
        groups = list(self._requeues.items())[: len(tickets) // size]
        done = 0
        for group, requests in groups:
            places = tickets[done : done + size]
            numbers = zip(places, requests, strict=False)  # a group may have fewer dead members
            new_to_dead = {place.number: request.number for place, request in numbers}
            group_tickets = self._tickets_for(places, new_to_dead)
            if not self._bus.requests.issue_requeued(
                self._lease, issued + done, group_tickets, max_backlog, requests
            ):
                break
            self._planner.requeued.update(new_to_dead)
            del self._requeues[group]
            done += size
            log.info("dead rollouts are requeued", new_to_dead=new_to_dead, group=group)
        return done

    def checkpoint_begins(self) -> None:
        """A checkpoint that records every purge so far is about to be written."""
        self._purges_written = list(self._purges)

    def checkpoint_is_durable(self) -> None:
        """It is written: the letters of those purges may go.

        Raises:
            LeaseLost: another trainer took over.
            OSError: the disk is full; the letters stay, and the next checkpoint tries again.
        """
        purges = self._purges_written
        if not purges:
            return
        # The file first: the requests are closed last, so a kill in between purges them again.
        forget_spilled(self._dead_file, {request.letter for request in purges})
        self._bus.requests.close(self._lease, purges, with_letters=True)
        numbers = sorted(request.number for request in purges)
        log.info("dead letters purged", numbers=numbers)
        self._purges = self._purges[len(purges) :]
        self._purges_written = []

    def spill_dead_letters(self, keep: int) -> None:
        """Move dead letters over the bound `keep` from Redis to the run's file.

        Raises:
            OSError: the disk is full; what was not written stays in Redis.
        """
        if moved := spill_dead(self._bus, self._dead_file, keep):
            log.info(
                "dead letters over delivery.max_dead moved to a file",
                letters=moved,
                file=str(self._dead_file),
            )

    def _not_settled(self, number: int, issued: int) -> bool:
        """Whether `number` exists and may yet turn out dead or alive."""
        return 0 < number <= issued and number not in self._acknowledgements.settled

    def _accept(self, request: OperatorRequest, step: int) -> str | None:
        """Accept a request, or say why not."""
        if request.kind == "purge" and request.letter:
            self._purge(request, step)
        elif request.kind != "requeue":
            return "it is neither a requeue nor the purge of a letter"
        elif not self._acknowledgements.settled.is_dead(request.number):
            return "the rollout is not dead"
        elif self._requeued_before(request.number):
            return "it was requeued before"
        else:
            group = (request.number - 1) // self._planner.group_size
            self._requeues.setdefault(group, []).append(request)
        self._accepted.add(request.id)
        return None

    def _purge(self, request: OperatorRequest, step: int) -> None:
        if self._acknowledgements.settled.is_dead(request.number):
            self._acknowledgements.purge(request.number, step)
        self._purges.append(request)

    def _requeued_before(self, number: int) -> bool:
        waiting = (request.number for requests in self._requeues.values() for request in requests)
        return number in self._planner.requeued.values() or number in waiting

    def _tickets_for(self, places: Sequence[Ticket], new_to_dead: dict[int, int]) -> list[Ticket]:
        requeued = {**self._planner.requeued, **new_to_dead}
        planner = replace(self._planner, requeued=requeued)
        return [planner.ticket(place.number, place.min_policy_version) for place in places]
