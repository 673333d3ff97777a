"""What only the trainer may do. Each call carries the epoch of the trainer's lease, and Redis refuses a lower one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from redis.exceptions import OutOfMemoryError, ResponseError

from pipeline import scripts
from pipeline.connection import Connection
from pipeline.errors import Exit, UserError
from pipeline.keys import GROUP, WORKING
from pipeline.records import PolicyVersion, Ticket, encode

log = structlog.get_logger(__name__)

ANNOUNCEMENTS_KEPT = 256
ACKNOWLEDGED_AT_ONCE = 500


class LeaseHeld(UserError):
    """Another trainer has this run; `holder` says which."""

    def __init__(self, run: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"the run {run} has a trainer already: {holder}",
            expected="one trainer to a run",
            next_step="Stop that one, or choose another run.name.",
            exit=Exit.REFUSED,
        )


class LeaseLost(Exception):
    """Another trainer took the run over; what this one was about to do did not happen."""


@dataclass(frozen=True)
class Lease:
    """The right to be the run's trainer."""

    epoch: int
    holder: str
    ttl_s: float


class Authority(Connection):
    """The trainer's calls. `lease` is the lease held, which the worker loop renews."""

    lease: Lease | None = None

    def acquire_lease(self, ttl_s: float) -> Lease:
        """Become the run's trainer, until released, or not renewed for `ttl_s` seconds.

        The lease of a process that died on this machine is taken over at once.

        Raises:
            LeaseHeld: another trainer has it.
        """
        me = f"{self.consumer} on {socket.gethostname()} pid {os.getpid()}"
        args: list[Any] = [me, _ms(ttl_s), ""]
        epoch, holder = self._run(scripts.ACQUIRE, [self.keys.epoch, self.keys.lease], args)
        if not epoch and _is_dead(holder.decode()):
            epoch, holder = self._run(scripts.ACQUIRE, [self.keys.epoch, self.keys.lease], [*args[:2], holder])
        if not epoch:
            raise LeaseHeld(self.run, holder.decode())
        self.lease = Lease(int(epoch), me, ttl_s)
        return self.lease

    def renew_lease(self, lease: Lease) -> None:
        """Hold the lease for another `ttl_s`.

        Raises:
            LeaseLost: another trainer took over.
        """
        self._fenced(scripts.RENEW_LEASE, lease, [self.keys.lease], [lease.holder, _ms(lease.ttl_s)])

    def release_lease(self, lease: Lease) -> None:
        """Stop being the trainer.

        Raises:
            LeaseLost: another trainer took over.
        """
        self.lease = None
        self._fenced(scripts.RELEASE_LEASE, lease, [self.keys.lease], [lease.holder])

    def issued(self) -> int:
        """How many tickets were ever issued; the number of the last one."""
        return int(self._ask("GET", self.keys.issued) or 0)

    def issue(self, lease: Lease, expected_issued: int, tickets: Sequence[Ticket], max_backlog: int) -> bool:
        """Issue `tickets`, numbered from `expected_issued` + 1, all or none; the same call may be repeated.

        Returns False, with nothing issued, while a working stream holds more than `max_backlog` records or Redis is full.

        Raises:
            LeaseLost: another trainer took over.
            ValueError: the numbers do not follow on `expected_issued`, or another count was issued.
        """
        if [ticket.number for ticket in tickets] != list(range(expected_issued + 1, expected_issued + 1 + len(tickets))):
            raise ValueError(f"tickets of numbers {[t.number for t in tickets][:4]}… do not follow on {expected_issued}")
        keys = [self.keys.issued, self.keys.stream("generate"), *self.stage_keys(WORKING)]
        try:
            return bool(self._fenced(scripts.ISSUE, lease, keys, [expected_issued, max_backlog, *_numbered(tickets)]))
        except OutOfMemoryError:
            log.warning("redis is full; no tickets until records have moved on")
            return False

    def reissue(self, lease: Lease, token: str, tickets: Sequence[Ticket]) -> bool:
        """Issue numbers again that got lost with Redis's data; once for each `token`, however often it is called.

        Returns False, with nothing issued, when Redis is full.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self.keys.reissued, self.keys.stream("generate")]
        try:
            return bool(self._fenced(scripts.REISSUE, lease, keys, [token, *_numbered(tickets)]))
        except OutOfMemoryError:
            return False

    def set_issued(self, lease: Lease, count: int) -> int:
        """Raise the count of issued tickets to `count`, where it is lower (Redis lost its data); returns what it is now.

        Raises:
            LeaseLost: another trainer took over.
        """
        return int(self._fenced(scripts.RAISE_ISSUED, lease, [self.keys.issued], [count]))

    def announce(self, lease: Lease, policy: PolicyVersion) -> None:
        """Make `policy` the newest; nothing happens when it is already.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self.keys.policy, self.keys.policies]
        self._fenced(scripts.ANNOUNCE, lease, keys, [encode(policy), ANNOUNCEMENTS_KEPT])

    def acknowledge(self, lease: Lease, ids: Sequence[bytes]) -> int:
        """Delete entries of the trainer's stream whose fate a durable checkpoint records; returns how many were there.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self.keys.stream("train")]
        chunks = batched_ids(ids, ACKNOWLEDGED_AT_ONCE)
        return sum(int(self._fenced(scripts.ACKNOWLEDGE, lease, keys, [GROUP, *chunk])) for chunk in chunks)

    def finish(self, lease: Lease) -> None:
        """Tell every worker that the run has ended.

        Raises:
            LeaseLost: another trainer took over.
        """
        self._fenced(scripts.SET_KEY, lease, [self.keys.finished], [lease.epoch])

    def reopen(self, lease: Lease) -> None:
        """Go on with a run that had ended.

        Raises:
            LeaseLost: another trainer took over.
        """
        self._fenced(scripts.CLEAR_KEY, lease, [self.keys.finished], [])

    def write_plan(self, lease: Lease, plan: bytes) -> None:
        """Write the run's plan.

        Raises:
            LeaseLost: another trainer took over.
        """
        self._fenced(scripts.SET_KEY, lease, [self.keys.plan], [plan])

    def read_plan(self) -> bytes | None:
        """The run's plan, once a trainer has written it."""
        plan: bytes | None = self._ask("GET", self.keys.plan)
        return plan

    def _fenced(self, script: scripts.Script, lease: Lease, keys: Sequence[str], args: Sequence[Any]) -> Any:
        try:
            return self._run(script, [self.keys.epoch, *keys], [lease.epoch, *args])
        except OutOfMemoryError:
            raise
        except ResponseError as error:
            if "LEASELOST" in str(error):
                raise LeaseLost(str(error)) from error
            if "MISCOUNT" in str(error):
                raise ValueError(str(error)) from error
            raise


def batched_ids(ids: Sequence[bytes], size: int) -> list[Sequence[bytes]]:
    """`ids` in runs of up to `size`."""
    return [ids[at : at + size] for at in range(0, len(ids), size)]


def _numbered(tickets: Sequence[Ticket]) -> list[Any]:
    return [value for ticket in tickets for value in (ticket.number, encode(ticket))]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _is_dead(holder: str) -> bool:
    """Whether `holder` was a process of this machine that is gone."""
    _, _, place = holder.rpartition(" on ")
    host, _, pid = place.partition(" pid ")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
