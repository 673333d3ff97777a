"""What operators ask of the trainer: to issue dead rollouts again, or to purge them.

Only the trainer issues tickets and settles numbers. So a command adds a request in Redis, and the
trainer serves it under its epoch, in one script with what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onstream.pipeline.record_codec import read_number
from onstream.pipeline.records import Ticket
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.connection import Connection
from onstream.pipeline.redis.lease import Lease
from onstream.pipeline.redis.trainer_lease import TrainerLease

RequestKind = Literal["requeue", "purge"]
AT_ONCE = 500


@dataclass(frozen=True)
class OperatorRequest:
    """What an operator asks for: `number` is dead, `letter` the entry of its dead letter or b"".

    `kind` may be anything, and `number` 0, where something else than our command wrote the entry.
    """

    id: bytes
    kind: RequestKind | str
    number: int
    letter: bytes = b""


class OperatorRequests:
    """The requests of a run. Anybody may add one; only the trainer closes them."""

    def __init__(self, connection: Connection, lease: TrainerLease) -> None:
        self._connection = connection
        self._keys = connection.keys
        self._lease = lease

    def add(self, kind: RequestKind, number: int, letter: bytes = b"") -> None:
        """Ask the trainer for something. A request that is added twice is served once."""
        self._connection.ask(
            "XADD", self._keys.requests, "*", "do", kind, "n", number, "letter", letter
        )

    def waiting(self) -> Iterator[OperatorRequest]:
        """The requests that are not served yet, in order."""
        start = "-"
        while rows := self._connection.ask(
            "XRANGE", self._keys.requests, start, "+", "COUNT", AT_ONCE
        ):
            yield from (_request(entry_id, fields) for entry_id, fields in rows)
            start = f"({rows[-1][0].decode()}"

    def requeued(self) -> dict[int, int]:
        """The dead number that each number issued in place of one replaces."""
        return {
            int(new): int(dead)
            for new, dead in self._connection.ask("HGETALL", self._keys.requeued).items()
        }

    def restore_requeued(self, lease: Lease, requeued: Mapping[int, int]) -> None:
        """Write `requeued` again, of which Redis may have lost a part.

        Raises:
            LeaseLost: another trainer took over.
        """
        if requeued:
            self._lease.fenced(
                scripts.FILL_HASH,
                lease,
                [self._keys.requeued],
                [value for pair in requeued.items() for value in pair],
            )

    def issue_requeued(
        self,
        lease: Lease,
        expected_issued: int,
        tickets: Sequence[Ticket],
        max_backlog: int,
        served: Sequence[OperatorRequest],
    ) -> bool:
        """Issue `tickets` as `TrainerLease.issue` does, and close the requests `served` with them.

        Each request is served by the ticket that names its dead number. Returns False, with nothing
        issued or closed, where `TrainerLease.issue` would.

        Raises:
            LeaseLost: another trainer took over.
            ValueError: another count was issued.
        """
        new = {ticket.requeued_from: ticket.number for ticket in tickets}
        named = [(request.id, new[request.number], request.number) for request in served]
        return self._lease.issue(lease, expected_issued, tickets, max_backlog, named)

    def close(
        self, lease: Lease, requests: Iterable[OperatorRequest], *, with_letters: bool = False
    ) -> None:
        """Delete `requests` that were served or refused, and, `with_letters`, their dead letters.

        Raises:
            LeaseLost: another trainer took over.
        """
        if pairs := [
            value
            for request in requests
            for value in (request.id, request.letter if with_letters else b"")
        ]:
            self._lease.fenced(
                scripts.CLOSE_REQUESTS, lease, [self._keys.requests, self._keys.dead], pairs
            )


def _request(entry_id: bytes, fields: dict[bytes, bytes]) -> OperatorRequest:
    kind = fields.get(b"do", b"").decode(errors="replace")
    number = read_number(fields.get(b"n", b""))
    return OperatorRequest(entry_id, kind, number, fields.get(b"letter", b""))
