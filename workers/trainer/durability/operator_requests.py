"""How the trainer serves what operators ask of it: dead rollouts asked for anew, and dead letters
purged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onstream.pipeline.records import Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import FILE, forget_spilled, spill_dead
from onstream.pipeline.redis.operator_requests import OperatorRequest
from onstream.pipeline.redis.trainer_lease import Lease
from onstream.pipeline.telemetry import get_logger
from onstream.workers.trainer.durability.acknowledgements import Acknowledgements
from onstream.workers.trainer.issuer import Issuer

log = get_logger()

POLL_S = 1.0


class OperatorRequestHandler:
    """The requests of one run, as its trainer sees them.

    A request waits until its number has settled: then it is certain to be dead. A requeue takes the
    place of the next new group in the window. A purge deletes its letter once a checkpoint records
    it.
    """

    def __init__(
        self,
        bus: Bus,
        lease: Lease,
        run_dir: Path,
        acknowledgements: Acknowledgements,
        issuer: Issuer,
    ) -> None:
        self._bus = bus
        self._lease = lease
        self._dead_file = run_dir / FILE
        self._acknowledgements = acknowledgements
        self._issuer = issuer
        self._requeues: dict[int, list[OperatorRequest]] = {}  # by the group of the dead
        self._purges: list[
            OperatorRequest
        ] = []  # in the acknowledgements, and not yet in a durable checkpoint
        self._taken: set[bytes] = set()
        self._next_look = 0.0

    def take_up_requeued(self) -> None:
        """Bring together what the checkpoint and Redis know of numbers that were asked for anew."""
        known = self._bus.requests.requeued()
        self._bus.requests.restore_requeued(
            self._lease,
            {new: dead for new, dead in self._issuer.requeued.items() if new not in known},
        )
        self._issuer.requeued.update(known)

    def look(self, step: int) -> None:
        """Take new requests in hand, now and then; `step` is the step that is being gathered.

        Raises:
            LeaseLost: another trainer took over.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + POLL_S
        refused = []
        issued = self._bus.state.issued()
        requests = list(self._bus.requests.waiting())
        self._taken.intersection_update(request.id for request in requests)
        for request in requests:
            waits = (
                0 < request.number <= issued
                and request.number not in self._acknowledgements.settled
            )
            if request.id in self._taken or waits:
                continue
            if reason := self._take(request, step):
                log.warning(
                    "a request was refused",
                    request=request.wish,
                    number=request.number,
                    reason=reason,
                )
                refused.append(request)
        self._bus.requests.close(self._lease, refused)

    def _take(self, request: OperatorRequest, step: int) -> str | None:
        """Take a request in hand, or say why not."""
        if request.wish == "purge" and request.letter:
            if self._acknowledgements.settled.is_dead(request.number):
                self._acknowledgements.purge(request.number, step)
            self._purges.append(request)
        elif request.wish != "requeue":
            return "it is neither a requeue nor the purge of a letter"
        elif not self._acknowledgements.settled.is_dead(request.number):
            return "the rollout is not dead"
        elif self._asked_for_anew(request.number):
            return "it was asked for anew before"
        else:
            self._requeues.setdefault((request.number - 1) // self._issuer.group_size, []).append(
                request
            )
        self._taken.add(request.id)
        return None

    def _asked_for_anew(self, number: int) -> bool:
        waiting = (request.number for requests in self._requeues.values() for request in requests)
        return number in self._issuer.requeued.values() or number in waiting

    def issue(self, tickets: Sequence[Ticket], issued: int, max_backlog: int) -> int:
        """Give the places of the first groups in `tickets` to dead rollouts asked for anew; returns
        how many tickets were issued so.

        Raises:
            LeaseLost: another trainer took over.
        """
        size = self._issuer.group_size
        at = 0
        for group, served in list(self._requeues.items())[: len(tickets) // size]:
            places = tickets[at : at + size]
            named = {
                place.number: request.number for place, request in zip(places, served, strict=False)
            }
            issuer = replace(self._issuer, requeued={**self._issuer.requeued, **named})
            again = [issuer.ticket(place.number, place.min_policy_version) for place in places]
            if not self._bus.requests.issue_requeued(
                self._lease, issued + at, again, max_backlog, served
            ):
                break
            self._issuer.requeued.update(named)
            del self._requeues[group]
            at += size
            log.info("dead rollouts are asked for anew", new_to_dead=named, group=group)
        return at

    def durable(self) -> None:
        """A checkpoint records every purge so far: their letters may go.

        Raises:
            LeaseLost: another trainer took over.
            OSError: the disk is full; the letters stay, and the next checkpoint tries again.
        """
        if self._purges:
            forget_spilled(self._dead_file, {request.letter for request in self._purges})
            self._bus.requests.close(self._lease, self._purges, with_letters=True)
            log.info(
                "dead letters purged", numbers=sorted(request.number for request in self._purges)
            )
            self._purges = []

    def spill(self, keep: int) -> None:
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
