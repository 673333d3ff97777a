"""All endpoints of one model: which of them is asked, what is asked again, and which are left alone
for a while.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import httpx
import tenacity

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.http.endpoint import Endpoint, http_client
from onstream.pipeline.http.errors import EndpointError, EndpointFault, RequestRefused
from onstream.pipeline.telemetry import get_logger
from onstream.settings.client import EndpointSettings

ROUNDS = 3
"""How often all attempts at one question may fail while others are answered, before it is given up.
"""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
TIMER_S = 0.01  # by which a timer may be early

E = TypeVar("E", bound=Endpoint)
T = TypeVar("T")

log = get_logger()


@dataclass(frozen=True)
class EndpointReply(Generic[T]):
    """An answer, and the name of the endpoint that gave it."""

    answer: T
    endpoint: str


class EndpointPool(Generic[E]):
    """Spreads questions over the endpoints, by what each has in flight. For one event loop alone.

    A failure is asked again, elsewhere if there is an elsewhere. An endpoint that failed
    `breaker_failures` times in a row is away: nothing is sent to it until, after a pause, it has
    passed `probe` anew, since the server that comes back need not be the one that left. Where the
    probe does not prove that the endpoint works (`proves` is False), one request tries it first.
    While none is there, questions wait; waiting counts as no attempt.

    `model`, `section`, the dotted name of the settings, and `role`, what the model is to the run,
    are for messages.
    """

    def __init__(
        self,
        client: EndpointSettings,
        make: Callable[[str, httpx.AsyncClient, float], E],
        *,
        model: str,
        section: str,
        probe: Callable[[E], Awaitable[None]],
        proves: bool,
        role: str = "teacher",
    ) -> None:
        self._client = client
        self._model = model
        self._section = section
        self._probe = probe
        self._proves = proves
        self._role = role
        self._http = http_client(client)
        self.endpoints = [make(url, self._http, client.timeout) for url in client.base_url]
        self.requests = self.failures = 0
        self._answered = 0
        self._last_fault = ""
        # the last fault of a question whose attempts all failed, until something is answered
        self._trouble = ""
        self._changed = asyncio.Condition()
        self._pace = RateLimiter(client.requests_per_second)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> int:
        """How many endpoints are there."""
        return sum(not endpoint.away for endpoint in self.endpoints)

    @property
    def capacity(self) -> int:
        """Requests that all endpoints together take at once; those that are away take none."""
        return sum(endpoint.takes(self._client.max_in_flight) for endpoint in self.endpoints)

    @property
    def in_flight(self) -> int:
        """Requests that wait for their reply."""
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    @property
    def problem(self) -> str:
        """What a worker with these endpoints waits for, in words; empty while all of them serve."""
        complaints = [
            f"{endpoint.name}: {endpoint.away}" for endpoint in self.endpoints if endpoint.away
        ]
        rests_s = [endpoint.rests_s for endpoint in self.endpoints if not endpoint.away]
        if not rests_s:
            return f"waiting for the {self._role}: {'; '.join(complaints)}"
        if left_s := min(rests_s):
            return (
                f"the {self._role} asked to be left alone for another {left_s:.0f} s (Retry-After)"
            )
        if self._trouble:
            return f"waiting for the {self._role}: {self._trouble}"
        return (
            f"{len(complaints)} of {len(self.endpoints)} endpoints are away: {'; '.join(complaints)}"
            if complaints
            else ""
        )

    async def open(self, *, patient: bool) -> None:
        """Probe every endpoint. Those that do not answer are tried again later; one must answer,
        unless `patient`.

        Raises:
            UserError: an endpoint answers and cannot be used, or none answers at all.
        """
        found = await asyncio.gather(
            *(self._probe(endpoint) for endpoint in self.endpoints), return_exceptions=True
        )
        for endpoint, outcome in zip(self.endpoints, found, strict=True):
            if isinstance(outcome, EndpointError):
                self._send_away(endpoint, str(outcome))
            elif outcome is not None:
                raise outcome
        if not patient and not self.serving:
            complaints = "; ".join(
                f"{endpoint.name}: {endpoint.away}" for endpoint in self.endpoints
            )
            raise UserError(
                f"no endpoint of the {self._role} {self._model!r} answers ({complaints})",
                expected=f"a server at {self._section}.client.base_url",
                next_step="Start it, or correct the address; a server that is still loading its model needs more time.",
                exit=Exit.UNREACHABLE,
            )

    def dismiss(self, endpoint: E, words: str) -> None:
        """Send nothing to `endpoint` until it has passed the probe anew; `words` say why."""
        if not endpoint.away or endpoint.trial:
            self._send_away(endpoint, words)

    async def close(self) -> None:
        """Ask no more, and close the connections."""
        for task in self._tasks:
            task.cancel()
        await self._http.aclose()

    async def ask(
        self, question: Callable[[E], Awaitable[T]], of: E | None = None
    ) -> EndpointReply[T]:
        """The answer to `question`; returns when some endpoint has given it, however long none is
        there.

        With `of`, that endpoint alone is asked, unless it is away.

        Raises:
            RequestRefused: an endpoint will not answer this one, or cannot although it answers others.
        """
        rounds = 0
        while True:
            answered = self._answered
            try:
                return await self.attempts(question, of)
            except EndpointFault as fault:
                rounds += self._answered > answered
                if rounds >= ROUNDS:
                    words = f"failed {rounds * (self._client.max_retries + 1)} times while others were answered; last: {fault}"
                    raise RequestRefused(words) from fault
                self._trouble = self._last_fault
            await asyncio.sleep(self._client.breaker_pause * random.uniform(0.5, 1.5))

    async def attempts(
        self, question: Callable[[E], Awaitable[T]], of: E | None = None
    ) -> EndpointReply[T]:
        """The answer to `question`, which is sent again up to `max_retries` times, after random and
        growing waits.

        Raises:
            RequestRefused: an endpoint will not answer it.
            EndpointFault: every attempt failed.
        """
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._client.max_retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=tenacity.retry_if_exception_type(EndpointFault),
            reraise=True,
        )
        return await retrying(self._attempt, question, of)

    async def _attempt(
        self, question: Callable[[E], Awaitable[T]], of: E | None
    ) -> EndpointReply[T]:
        async with self._turn(of) as endpoint:
            await self._pace.wait()
            self.requests += 1
            try:
                answer = await question(endpoint)
            except EndpointFault as fault:
                self._count_fault(endpoint, fault)
                raise
            except RequestRefused as refusal:
                self._count_refusal(endpoint, str(refusal))
                raise RequestRefused(
                    f"{endpoint.name} refused it: {refusal}", status=refusal.status
                ) from refusal
            self._count_sign_of_life(endpoint)
            self._answered = self._answered + 1
            self._trouble = ""
            return EndpointReply(answer, endpoint.name)

    @asynccontextmanager
    async def _turn(self, of: E | None) -> AsyncIterator[E]:
        """The endpoint with the fewest requests in flight, as soon as one has room for another;
        `of`, while it is there.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._free(of))
            endpoint = min(self._free(of), key=lambda free: (free.in_flight, random.random()))
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            await self._wake()

    def _free(self, of: E | None) -> list[E]:
        most = self._client.max_in_flight
        wanted = self.endpoints if of is None or of.away else [of]
        return [one for one in wanted if one.in_flight < one.takes(most) and not one.rests_s]

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _count_fault(self, endpoint: E, fault: EndpointFault) -> None:
        self.failures += 1
        self._last_fault = f"{endpoint.name}: {fault}"
        log.warning("the endpoint failed a request", endpoint=endpoint.name, reason=str(fault))
        if fault.retry_after_s:
            endpoint.rest(fault.retry_after_s)
            self._start(self._wake_after_rest(endpoint))
        if fault.breaks or endpoint.trial:
            self._count_failure(endpoint, str(fault))

    def _count_refusal(self, endpoint: E, words: str) -> None:
        """A server that refuses one question after the other is probed, where that proves anything;
        else it is alive and well.
        """
        if self._proves:
            self._count_failure(endpoint, words)
        else:
            self._count_sign_of_life(endpoint)

    def _count_failure(self, endpoint: E, words: str) -> None:
        endpoint.failures += 1
        if endpoint.trial or (
            endpoint.failures >= self._client.breaker_failures and not endpoint.away
        ):
            self._send_away(endpoint, words)

    def _count_sign_of_life(self, endpoint: E) -> None:
        endpoint.failures = 0
        if endpoint.trial:
            self._welcome(endpoint)

    def _send_away(self, endpoint: E, words: str) -> None:
        endpoint.away = words
        endpoint.trial = False
        log.warning(
            "the endpoint is left alone",
            endpoint=endpoint.name,
            reason=words,
            pause_s=self._client.breaker_pause,
        )
        self._start(self._bring_back(endpoint))

    async def _bring_back(self, endpoint: E) -> None:
        """Probe an endpoint that is away, pause by pause, until it passes."""
        while endpoint.away and not endpoint.trial:
            await asyncio.sleep(
                max(endpoint.rests_s, self._client.breaker_pause * random.uniform(1, 1.3))
            )
            try:
                await self._probe(endpoint)
            except (EndpointError, UserError) as error:
                endpoint.away = str(error)
                endpoint.rest(error.retry_after_s if isinstance(error, EndpointFault) else None)
            else:
                self._welcome(endpoint, trial=not self._proves)
        await self._wake()

    def _welcome(self, endpoint: E, *, trial: bool = False) -> None:
        endpoint.trial = trial
        if not trial:
            endpoint.away = ""
            endpoint.failures = 0
            log.info("the endpoint is back", endpoint=endpoint.name)

    async def _wake_after_rest(self, endpoint: E) -> None:
        await asyncio.sleep(endpoint.rests_s + TIMER_S)
        await self._wake()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class RateLimiter:
    """Spaces requests by 1 / `per_second`; None lets them pass."""

    def __init__(self, per_second: float | None) -> None:
        self._gap_s = 0.0 if per_second is None else 1 / per_second
        self._next = 0.0

    async def wait(self) -> None:
        """Wait for this request's turn."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._gap_s
        if turn > now:
            await asyncio.sleep(turn - now)
