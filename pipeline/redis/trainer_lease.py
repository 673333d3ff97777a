"""What only the trainer may do in Redis.

Each call carries the epoch of the trainer's lease, and Redis refuses it once a later trainer has
raised the epoch. So a trainer that was frozen and lost its lease changes nothing when it wakes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import structlog
from redis.exceptions import OutOfMemoryError, ResponseError

from onstream.pipeline.errors import LeaseLost
from onstream.pipeline.record_codec import encode
from onstream.pipeline.records import PolicyVersion, Ticket, Tombstone
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection, batched
from onstream.pipeline.redis.keys import GROUP, WORKING
from onstream.pipeline.redis.lease import DataLost, Lease, LeaseHeld, is_dead, while_it_may_expire
from onstream.pipeline.run_files.ownership import Ownership
from onstream.settings.stages import StreamName, stage_of, takes_tickets

T = TypeVar("T")
log = structlog.get_logger(__name__)

ANNOUNCEMENTS_KEPT = 256
ACKNOWLEDGED_AT_ONCE = 500


class TrainerLease:
    """What only the trainer may do. `current` is the lease held, which the worker loop renews.

    `may_have_lost_data` is set once Redis may have lost data. Whoever clears it first compares what
    Redis has with what it should have.

    No ticket is issued until each of `required_stages` has been ready. Where the last tickets were
    refused, `missing_stages` are those that are not, and `full` tells whether Redis has no memory
    for them.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = connection.keys
        self.current: Lease | None = None
        self.may_have_lost_data = False
        self.full = False
        self.required_stages: Sequence[StreamName] = ()
        self.missing_stages: list[StreamName] = []

    def acquire(self, ttl_s: float, files: Ownership | None = None) -> Lease:
        """Become the run's trainer, and claim its `files`.

        The lease ends when it is released, or was not renewed for `ttl_s` seconds. The lease of a
        process that died on this machine is taken over at once.

        Raises:
            LeaseHeld: another trainer has it.
            LeaseLost: another trainer took over while this one waited for the files.
        """
        me = f"{self._connection.consumer} on {socket.gethostname()} pid {os.getpid()}"
        self.current = Lease(
            self._acquire(me, ttl_s, files.newest() if files else 0), me, ttl_s, files
        )
        if files is not None:
            files.take(self.current.epoch, me)
        return self.current

    def _acquire(self, me: str, ttl_s: float, floor: int) -> int:
        """The epoch of the lease, above `floor`."""
        keys = [self._keys.epoch, self._keys.lease]
        args = [me, _ms(ttl_s), floor]
        epoch, holder = self._connection.run_script(scripts.ACQUIRE, keys, [*args, ""])
        if not epoch and is_dead(holder.decode()):
            epoch, holder = self._connection.run_script(scripts.ACQUIRE, keys, [*args, holder])
        if not epoch:
            raise LeaseHeld(self._connection.run, holder.decode())
        return int(epoch)

    def renew(self, lease: Lease) -> None:
        """Hold the lease for another `ttl_s`.

        Raises:
            LeaseLost: another trainer took over.
        """
        self.fenced(
            scripts.RENEW_LEASE, lease, [self._keys.lease], [lease.holder, _ms(lease.ttl_s)]
        )

    def renew_from_heartbeat(self, lease: Lease) -> None:
        """Renew the lease from the heartbeat's thread, and look whether Redis may have lost data.

        If so, `may_have_lost_data` is set. Another server process than before counts as that: a
        restart, or a replica in its place.

        Raises:
            LeaseLost: another trainer took over.
        """
        if self._connection.server_changed():
            self.may_have_lost_data = True
        if not lease.changing.acquire(blocking=False):
            return  # the main thread is taking it again just now, under another epoch
        try:
            self._once_fenced(
                scripts.RENEW_LEASE, lease, [self._keys.lease], [lease.holder, _ms(lease.ttl_s)]
            )
        except DataLost:
            self.may_have_lost_data = True
        finally:
            lease.changing.release()

    @contextmanager
    def writing(self, lease: Lease) -> Iterator[None]:
        """Hold the right to change the run's files, which are the trainer's alone; may be nested.

        Raises:
            LeaseLost: another trainer took over; nothing was changed.
        """
        self.renew(lease)
        with lease.files.held() if lease.files else nullcontext():
            yield

    def release(self, lease: Lease) -> None:
        """Stop being the trainer.

        Raises:
            LeaseLost: another trainer took over.
        """
        self.current = None
        try:
            self._once_fenced(scripts.RELEASE_LEASE, lease, [self._keys.lease], [lease.holder])
        except DataLost:
            log.warning("redis has lost the lease that was to be released", epoch=lease.epoch)

    def issue(
        self,
        lease: Lease,
        expected_issued: int,
        tickets: Sequence[Ticket | Tombstone],
        max_backlog: int,
        served: Sequence[tuple[bytes, int, int]] = (),
    ) -> bool:
        """Issue `tickets`, numbered from `expected_issued` + 1, all or none; may be repeated.

        With tombstones instead of tickets, the numbers go to the trainer, as dead from the start.
        `served` are the operator requests that go with them: id, new number and dead number of
        each.

        Returns False, with nothing issued, while a working stream holds more than `max_backlog`
        records, or stages are missing, or Redis is `full`, or it has forgotten tickets before these
        (then `may_have_lost_data` is set).

        Raises:
            LeaseLost: another trainer took over.
            ValueError: the numbers do not follow on `expected_issued`, or another count was issued.
        """
        numbers = [ticket.number for ticket in tickets]
        if numbers != list(range(expected_issued + 1, expected_issued + 1 + len(tickets))):
            raise ValueError(
                f"tickets of numbers {numbers[:4]}… do not follow on {expected_issued}"
            )
        keys = [
            self._keys.issued,
            self._tickets_stream(tickets),
            self._keys.requests,
            self._keys.requeued,
            *self._working(),
        ]
        requests = [value for request in served for value in request]
        args = [
            len(served),
            expected_issued,
            max_backlog,
            *self.required_stages,
            *requests,
            *_numbered(tickets),
        ]
        return self._issue(scripts.ISSUE, lease, keys, args)

    def _working(self) -> list[str]:
        """The streams whose backlog counts."""
        streams = self._keys.streams.items()
        return [key for name, key in streams if stage_of(name) in WORKING]

    def _tickets_stream(self, tickets: Sequence[Ticket | Tombstone]) -> str:
        """The stream of `tickets`, which are of one run, and all tickets or all tombstones."""
        first = tickets[0] if tickets else None
        if isinstance(first, Tombstone):
            return self._keys.streams["train"]
        route = first.route if first is not None else ()
        return self._keys.streams[takes_tickets(route)]

    def _issue(
        self, script: scripts.Script, lease: Lease, keys: Sequence[str], args: Sequence[Any]
    ) -> bool:
        """Whether the tickets in `args` are issued.

        None are while a stage is missing or Redis is full, nor after it has lost tickets.
        """
        was_full = self.full
        self.full = False
        self.missing_stages = []
        keys = [self._keys.ready, *keys]
        args = [len(self.required_stages), *args]
        try:
            reply = self.fenced(script, lease, keys, args)
            if isinstance(reply, list):
                missing = {stage.decode() for stage in reply}
                self.missing_stages = [s for s in self.required_stages if s in missing]
                return False
            return bool(reply)
        except DataLost:
            self.may_have_lost_data = True
        except OutOfMemoryError:
            self.full = True
            if not was_full:
                log.warning("redis is full; no tickets until records have moved on")
        return False

    def reissue(self, lease: Lease, token: str, tickets: Sequence[Ticket]) -> bool:
        """Issue numbers again that were lost with Redis's data, once for each `token`.

        Returns False, with nothing issued, when Redis is full or stages are missing.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self._keys.reissued, self._tickets_stream(tickets)]
        args = [token, *self.required_stages, *_numbered(tickets)]
        return self._issue(scripts.REISSUE, lease, keys, args)

    def set_issued(self, lease: Lease, count: int) -> int:
        """Raise the count of issued tickets to `count`, where it is lower; returns what it is now.

        It is lower when Redis has lost data.

        Raises:
            LeaseLost: another trainer took over.
        """
        return int(self.fenced(scripts.RAISE_ISSUED, lease, [self._keys.issued], [count]))

    def announce(self, lease: Lease, policy: PolicyVersion) -> None:
        """Make `policy` the newest and announce it, unless it is the newest already.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [self._keys.policy, self._keys.policies, self._keys.announced]
        args = [encode(policy), ANNOUNCEMENTS_KEPT, policy.number]
        self.fenced(scripts.ANNOUNCE, lease, keys, args)

    def acknowledge(self, lease: Lease, entries: Mapping[bytes, int]) -> int:
        """Delete entries of the trainer's stream; returns how many were there.

        `entries` are numbers by entry id, which have settled, and which a journal or a checkpoint
        holds. Images that no other number needs go with them.

        Raises:
            LeaseLost: another trainer took over.
        """
        keys = [
            self._keys.streams["train"],
            self._keys.images_held,
            self._keys.images_counted,
            self._keys.images,
        ]
        chunks = batched(list(entries), ACKNOWLEDGED_AT_ONCE)
        numbered = (
            [part for entry_id in chunk for part in (entry_id, entries[entry_id])]
            for chunk in chunks
        )
        return sum(
            int(self.fenced(scripts.ACKNOWLEDGE, lease, keys, [GROUP, *some])) for some in numbered
        )

    def finish(self, lease: Lease) -> None:
        """Tell every worker that the run has ended.

        Raises:
            LeaseLost: another trainer took over.
        """
        self.fenced(scripts.SET_KEY, lease, [self._keys.finished], [lease.epoch])

    def reopen(self, lease: Lease) -> None:
        """Undo `finish`: the run goes on.

        Raises:
            LeaseLost: another trainer took over.
        """
        self.fenced(scripts.DELETE_KEY, lease, [self._keys.finished], [])

    def write_plan(self, lease: Lease, plan: bytes) -> None:
        """Write the run's plan.

        Raises:
            LeaseLost: another trainer took over.
        """
        self.fenced(scripts.SET_KEY, lease, [self._keys.plan], [plan])

    def fenced(
        self, script: scripts.Script, lease: Lease, keys: Sequence[str], args: Sequence[Any]
    ) -> Any:
        """The reply of a script that carries the epoch.

        Where Redis has lost the epoch with its data, the lease is taken again first.

        Raises:
            LeaseLost: another trainer took over.
            DataLost: Redis has lost other data that the script relies on.
            ValueError: another count of tickets was issued than expected.
        """
        epoch = lease.epoch
        try:
            return self._once_fenced(script, lease, keys, args)
        except DataLost:
            if not self._has_lost(epoch):
                raise
            with lease.changing:
                if lease.epoch == epoch:  # else another thread has just taken it again
                    self._regain(lease)
            return self._once_fenced(script, lease, keys, args)

    def _once_fenced(
        self, script: scripts.Script, lease: Lease, keys: Sequence[str], args: Sequence[Any]
    ) -> Any:
        try:
            return self._connection.run_script(
                script, [self._keys.epoch, *keys], [lease.epoch, *args]
            )
        except OutOfMemoryError:
            raise
        except ResponseError as error:
            if "LEASELOST" in str(error):
                raise LeaseLost(str(error)) from error
            if "DATALOST" in str(error):
                raise DataLost(str(error)) from error
            if "MISCOUNT" in str(error):
                raise ValueError(str(error)) from error
            raise

    def _has_lost(self, epoch: int) -> bool:
        return int(self._connection.ask("GET", self._keys.epoch) or 0) < epoch

    def _regain(self, lease: Lease) -> None:
        """Take the lease again, which Redis has lost.

        An older state of Redis may come back with the lease of an earlier trainer, dead by now:
        that one is waited for. The run's files decide whether a later trainer was there meanwhile.

        Raises:
            LeaseLost: another trainer was faster, or has the run's files.
        """
        self.may_have_lost_data = True
        lost = lease.epoch
        if lease.files is not None and (newest := lease.files.newest()) != lost:
            raise LeaseLost(
                f"redis has lost the lease of epoch {lost}, which was followed by {newest}"
            )
        try:
            epoch = while_it_may_expire(
                lambda: self._acquire(lease.holder, lease.ttl_s, lost), lease.ttl_s
            )
        except LeaseHeld as held:
            raise LeaseLost(
                f"redis has lost the lease of epoch {lost}, and {held.holder} has it now"
            ) from held
        if lease.files is not None:
            lease.files.take(epoch, lease.holder)
        log.error(
            "redis has lost its data, the lease with it; taken again",
            epoch_before=lost,
            epoch=epoch,
        )
        lease.epoch = epoch


def _numbered(tickets: Sequence[Ticket | Tombstone]) -> list[Any]:
    return [value for ticket in tickets for value in (ticket.number, encode(ticket))]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
