"""All endpoints of one model: which gets a request, what is sent again, and which are down."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import httpx
import tenacity

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.http.endpoint import (
    BadReply,
    Endpoint,
    EndpointError,
    EndpointFault,
    RequestRefused,
    http_client,
)
from onstream.pipeline.telemetry import get_logger
from onstream.settings.sections.client import EndpointSettings

ROUNDS = 3
"""A request is given up when all its attempts failed so many times, while others were answered or
would have been."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
TIMER_S = 0.01
"""A timer may be early by this."""

E = TypeVar("E", bound=Endpoint)
T = TypeVar("T")

log = get_logger()


@dataclass(frozen=True)
class EndpointReply(Generic[T]):
    """An answer, and the name of the endpoint that gave it."""

    answer: T
    endpoint: str


class EndpointPool(Generic[E]):
    """Spreads requests over the endpoints, by what each has in flight. For one event loop alone.

    What failed is sent again, to another endpoint if there is one. An endpoint that failed
    `breaker_failures` times in a row is down: after a pause it is checked anew, since the server
    that comes back need not be the one that left. A `conclusive` check proves that the endpoint
    works. After another kind of check, one request tries it first. While all endpoints are down,
    requests wait; waiting counts as no attempt.

    `model`, `section` (the dotted name of the settings) and `role` (what the model is to the run)
    are for messages.
    """

    def __init__(
        self,
        client: EndpointSettings,
        make: Callable[[str, httpx.AsyncClient, float], E],
        *,
        model: str,
        section: str,
        check: Callable[[E], Awaitable[None]],
        conclusive: bool,
        role: str = "teacher",
    ) -> None:
        self._client = client
        self._model = model
        self._section = section
        self._check = check
        self._conclusive = conclusive
        self._role = role
        self._http = http_client(client)
        self.endpoints = [make(url, self._http, client.timeout) for url in client.base_url]
        for endpoint in self.endpoints:
            endpoint.max_reply_bytes = client.max_reply << 20
        self.requests = 0
        self.failures = 0
        self._answered = 0
        self._answered_at_last_lone = 0
        """Answers that had come when a request was last given up by its own failures alone."""
        self._asking = 0
        self._checking = asyncio.Lock()
        self._passed_at = 0.0
        self._last_fault = ""
        self._trouble = ""
        """The last fault of a request whose attempts all failed; empty once one is answered."""
        self._changed = asyncio.Condition()
        self._rate_limiter = RateLimiter(client.requests_per_second)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> int:
        """How many endpoints serve."""
        return sum(not endpoint.down for endpoint in self.endpoints)

    @property
    def capacity(self) -> int:
        """Requests that all endpoints together take at once; those that are down take none."""
        return sum(endpoint.takes(self._client.max_in_flight) for endpoint in self.endpoints)

    @property
    def in_flight(self) -> int:
        """Requests that wait for their reply."""
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    @property
    def problem(self) -> str:
        """What the worker waits for; empty while all endpoints serve."""
        complaints = self._complaints()
        rests_s = [endpoint.rests_s for endpoint in self.endpoints if not endpoint.down]
        if not rests_s:
            return f"waiting for the {self._role}: {complaints}"
        if left_s := min(rests_s):
            return f"the {self._role} asked for a pause of another {left_s:.0f} s (Retry-After)"
        if self._trouble:
            return f"waiting for the {self._role}: {self._trouble}"
        if not complaints:
            return ""
        down = len(self.endpoints) - self.serving
        return f"{down} of {len(self.endpoints)} endpoints are down: {complaints}"

    async def open(self, *, patient: bool) -> None:
        """Check every endpoint.

        Those that do not answer are tried again later. One must answer, unless `patient`.

        Raises:
            UserError: an endpoint answers and cannot be used, or none answers at all.
        """
        outcomes = await asyncio.gather(
            *(self._check(endpoint) for endpoint in self.endpoints), return_exceptions=True
        )
        for endpoint, outcome in zip(self.endpoints, outcomes, strict=True):
            if isinstance(outcome, EndpointError):
                self._set_down(endpoint, str(outcome))
            elif outcome is not None:
                raise outcome
        if not patient and not self.serving:
            raise UserError(
                f"no endpoint of the {self._role} {self._model!r} answers ({self._complaints()})",
                expected=f"a server at {self._section}.client.base_url",
                next_step="Start it, or correct the address. A server that is still loading its "
                "model needs more time.",
                exit=Exit.UNREACHABLE,
            )

    def mark_down(self, endpoint: E, reason: str) -> None:
        """Send nothing to `endpoint` until it has passed the check anew."""
        if not endpoint.down or endpoint.trial:
            self._set_down(endpoint, reason)

    async def close(self) -> None:
        """Stop checking, and close the connections."""
        for task in self._tasks:
            task.cancel()
        await self._http.aclose()

    async def ask(
        self, request: Callable[[E], Awaitable[T]], of: E | None = None
    ) -> EndpointReply[T]:
        """The answer to `request`.

        Returns when some endpoint has given it, however long all are down. With `of`, that endpoint
        alone is asked, unless it is down.

        Raises:
            RequestRefused: an endpoint refuses this one, or fails at it although it answers others.
        """
        self._asking += 1
        try:
            return await self._ask_until_given_up(request, of)
        finally:
            self._asking -= 1

    async def _ask_until_given_up(
        self, request: Callable[[E], Awaitable[T]], of: E | None
    ) -> EndpointReply[T]:
        rounds = 0
        while True:
            answered_before = self._answered
            started = time.monotonic()
            try:
                return await self.attempts(request, of)
            except EndpointFault as fault:
                # Only rounds in which others were answered count: a server that fails at all
                # requests is waited for. The last request of all has no others to be judged by.
                others = self._answered > answered_before
                lone = not others and await self._would_answer(fault, started)
                rounds += others or lone
                if rounds >= ROUNDS:
                    raise self._given_up(fault, lone=lone) from fault
                self._trouble = self._last_fault
            await asyncio.sleep(self._client.breaker_pause * random.uniform(0.5, 1.5))

    async def _would_answer(self, fault: EndpointFault, since: float) -> bool:
        """Whether an endpoint would answer another request than the one that ended in `fault`.

        A conclusive check that passes after `since` proves it, for a reply with the wrong content,
        and for any failure of the only request that is there. Without such a check, a wrong reply
        to the only request speaks against it, if others were answered since the last one of which
        this was said: a server that has lost its senses costs one request, not all.
        """
        wrong = isinstance(fault, BadReply)
        only = self._asking == 1
        if not self._conclusive:
            return wrong and only and self._answered > self._answered_at_last_lone
        if not (wrong or (only and fault.breaks)):
            return False
        async with self._checking:  # many requests ask for one check
            for endpoint in self.endpoints:
                if self._passed_at > since:
                    break
                with suppress(EndpointError, UserError):
                    await self._check(endpoint)
                    self._passed_at = time.monotonic()
        return self._passed_at > since

    def _given_up(self, fault: EndpointFault, *, lone: bool) -> RequestRefused:
        attempts = ROUNDS * (self._client.max_retries + 1)
        meanwhile = "while others were answered"
        if lone:
            self._answered_at_last_lone = self._answered
            meanwhile = "with no other request to be answered"
        return RequestRefused(f"failed {attempts} times {meanwhile}; last: {fault}")

    async def attempts(
        self, request: Callable[[E], Awaitable[T]], of: E | None = None
    ) -> EndpointReply[T]:
        """The answer to `request`.

        It is sent again up to `max_retries` times, after random and growing waits.

        Raises:
            RequestRefused: an endpoint refuses it.
            EndpointFault: every attempt failed.
        """
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._client.max_retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=tenacity.retry_if_exception_type(EndpointFault),
            reraise=True,
        )
        return await retrying(self._attempt, request, of)

    async def _attempt(
        self, request: Callable[[E], Awaitable[T]], of: E | None
    ) -> EndpointReply[T]:
        async with self._turn(of) as endpoint:
            await self._rate_limiter.wait()
            self.requests += 1
            try:
                answer = await request(endpoint)
            except EndpointFault as fault:
                self._count_fault(endpoint, fault)
                raise
            except RequestRefused as refusal:
                self._count_refusal(endpoint, str(refusal))
                raise RequestRefused(
                    f"{endpoint.name} refused it: {refusal}", status=refusal.status
                ) from refusal
            self._count_success(endpoint)
            self._answered += 1
            self._trouble = ""
            return EndpointReply(answer, endpoint.name)

    @asynccontextmanager
    async def _turn(self, of: E | None) -> AsyncIterator[E]:
        """The endpoint with the fewest requests in flight, as soon as one has room for another.

        With `of`, that one, unless it is down.
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
        eligible = self.endpoints if of is None or of.down else [of]
        return [one for one in eligible if one.in_flight < one.takes(most) and not one.rests_s]

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _complaints(self) -> str:
        """Why endpoints are down; empty where none is."""
        down = [endpoint for endpoint in self.endpoints if endpoint.down]
        return "; ".join(f"{endpoint.name}: {endpoint.down}" for endpoint in down)

    def _count_fault(self, endpoint: E, fault: EndpointFault) -> None:
        self.failures += 1
        self._last_fault = f"{endpoint.name}: {fault}"
        log.warning("the endpoint failed a request", endpoint=endpoint.name, reason=str(fault))
        if fault.retry_after_s:
            endpoint.rest(fault.retry_after_s)
            self._start(self._wake_after_rest(endpoint))
        if fault.breaks or endpoint.trial:
            self._count_failure(endpoint, str(fault))

    def _count_refusal(self, endpoint: E, reason: str) -> None:
        """Count a refusal as a failure where the check is conclusive.

        So a server that refuses one request after the other is checked anew. Elsewhere a refusal
        shows that the server works.
        """
        if self._conclusive:
            self._count_failure(endpoint, reason)
        else:
            self._count_success(endpoint)

    def _count_failure(self, endpoint: E, reason: str) -> None:
        endpoint.failures += 1
        too_many = endpoint.failures >= self._client.breaker_failures
        if endpoint.trial or (too_many and not endpoint.down):
            self._set_down(endpoint, reason)

    def _count_success(self, endpoint: E) -> None:
        endpoint.failures = 0
        if endpoint.trial:
            self._set_up(endpoint)

    def _set_down(self, endpoint: E, reason: str) -> None:
        endpoint.down = reason
        endpoint.trial = False
        log.warning(
            "the endpoint is down and gets no requests",
            endpoint=endpoint.name,
            reason=reason,
            pause_s=self._client.breaker_pause,
        )
        self._start(self._bring_back(endpoint))

    async def _bring_back(self, endpoint: E) -> None:
        """Check an endpoint that is down after every pause, until it passes."""
        while endpoint.down and not endpoint.trial:
            pause_s = self._client.breaker_pause * random.uniform(1, 1.3)
            await asyncio.sleep(max(endpoint.rests_s, pause_s))
            try:
                await self._check(endpoint)
            except (EndpointError, UserError) as error:
                endpoint.down = str(error)
                endpoint.rest(error.retry_after_s if isinstance(error, EndpointFault) else None)
            else:
                self._set_up(endpoint, trial=not self._conclusive)
        await self._wake()

    def _set_up(self, endpoint: E, *, trial: bool = False) -> None:
        endpoint.trial = trial
        if not trial:
            endpoint.down = ""
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
    """Spaces requests by 1 / `per_second` seconds; with None it lets them pass."""

    def __init__(self, per_second: float | None) -> None:
        self._gap_s = 0.0 if per_second is None else 1 / per_second
        self._next = 0.0

    async def wait(self) -> None:
        """Wait for the turn of this request."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._gap_s
        if turn > now:
            await asyncio.sleep(turn - now)
