"""What operators ask of the trainer, and how it answers: dead rollouts asked for anew, or purged.

The trainer alone issues tickets and settles numbers. So a command leaves a request in Redis, and
the trainer serves it under its epoch, in one script with what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onstream.pipeline.records import Ticket, encode
from onstream.pipeline.redis import scripts
from onstream.pipeline.redis.keys import WORKING
from onstream.pipeline.redis.trainer_lease import Authority, Lease

Wish = Literal["requeue", "purge"]
AT_ONCE = 500


@dataclass(frozen=True)
class Request:
    """One wish of an operator: `number` is dead, `letter` the entry of its dead letter, b"" where
    it has none.

    `wish` may be anything, and `number` 0, where something else than our command wrote the entry.
    """

    id: bytes
    wish: Wish | str
    number: int
    letter: bytes = b""


class Desk(Authority):
    """The requests of a run. Anybody may leave one; closing them takes the trainer's lease."""

    def leave_request(self, wish: Wish, number: int, letter: bytes = b"") -> None:
        """Ask the trainer for something. One left twice is served once."""
        self._ask("XADD", self.keys.requests, "*", "do", wish, "n", number, "letter", letter)

    def requests(self) -> Iterator[Request]:
        """The requests that were not served yet, in order."""
        start = "-"
        while rows := self._ask("XRANGE", self.keys.requests, start, "+", "COUNT", AT_ONCE):
            yield from (_request(entry_id, fields) for entry_id, fields in rows)
            start = f"({rows[-1][0].decode()}"

    def requeued(self) -> dict[int, int]:
        """The numbers that were issued in place of dead ones, with those."""
        return {
            int(new): int(dead) for new, dead in self._ask("HGETALL", self.keys.requeued).items()
        }

    def keep_requeued(self, lease: Lease, requeued: Mapping[int, int]) -> None:
        """Write down what Redis has forgotten of `requeued`.

        Raises:
            LeaseLost: another trainer took over.
        """
        if requeued:
            self._fenced(
                scripts.FILL_HASH,
                lease,
                [self.keys.requeued],
                [value for pair in requeued.items() for value in pair],
            )

    def issue_requeued(
        self,
        lease: Lease,
        expected_issued: int,
        tickets: Sequence[Ticket],
        max_backlog: int,
        served: Sequence[Request],
    ) -> bool:
        """Issue `tickets` as `issue` does; those that name a dead number serve the request for it
        in `served`.

        Returns False, with nothing issued or served, where `issue` would.

        Raises:
            LeaseLost: another trainer took over.
            ValueError: another count was issued.
        """
        new = {ticket.requeued_from: ticket.number for ticket in tickets}
        named = [
            value
            for request in served
            for value in (request.id, new[request.number], request.number)
        ]
        payloads = [value for ticket in tickets for value in (ticket.number, encode(ticket))]
        keys = [
            self.keys.issued,
            self.keys.stream("generate"),
            self.keys.requests,
            self.keys.requeued,
            *self.stage_keys(WORKING),
        ]
        args: list[Any] = [expected_issued, max_backlog, len(served), *named, *payloads]
        return self._issue(scripts.ISSUE_REQUEUED, lease, keys, args)

    def close_requests(
        self, lease: Lease, requests: Iterable[Request], *, with_letters: bool = False
    ) -> None:
        """Delete `requests` that were served or refused, and their dead letters too where asked.

        Raises:
            LeaseLost: another trainer took over.
        """
        if pairs := [
            value
            for request in requests
            for value in (request.id, request.letter if with_letters else b"")
        ]:
            self._fenced(scripts.CLOSE_REQUESTS, lease, [self.keys.requests, self.keys.dead], pairs)


def _request(entry_id: bytes, fields: dict[bytes, bytes]) -> Request:
    wish = fields.get(b"do", b"").decode(errors="replace")
    number = fields.get(b"n", b"")
    return Request(
        entry_id, wish, int(number) if number.isdigit() else 0, fields.get(b"letter", b"")
    )
