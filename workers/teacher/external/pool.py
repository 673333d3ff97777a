"""All endpoints of one teacher: which of them is asked, what is asked again, and which are left alone for a while."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import tenacity

from pipeline.errors import Exit, UserError
from pipeline.records import Logprobs
from pipeline.telemetry import get_logger
from settings.client import TeacherModelSettings
from workers.teacher.external.endpoint import Endpoint
from workers.teacher.external.faults import EndpointFault, Refused
from workers.teacher.external.probe import ALIKE_NATS, SECTION, distance
from workers.teacher.scorer import ScoreRequest, Scores

ROUNDS = 3
"""How often all attempts at one sample may fail while others succeed, before it is given up."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0

log = get_logger()


@dataclass(frozen=True)
class Scored:
    """Scores, and the name of the endpoint that gave them."""

    scores: Scores
    endpoint: str


class Pool:
    """Spreads requests over the endpoints, by what each has in flight. For one event loop alone.

    A failure is asked again, elsewhere if there is an elsewhere. An endpoint that failed `breaker_failures` times in a
    row is away: nothing is sent to it until, after a pause, it has passed the probe anew, since the server that comes
    back need not be the one that left. While none is there, requests wait; waiting counts as no attempt.
    """

    def __init__(
        self, teacher: TeacherModelSettings, http: httpx.AsyncClient, top_k: int, probe: Callable[[Endpoint], Awaitable[Logprobs]]
    ) -> None:
        self._client, self._model, self._top_k, self._probe, self._http = teacher.client, teacher.model.name, top_k, probe, http
        self.endpoints = [Endpoint(url, http, teacher.client.timeout) for url in teacher.client.base_url]
        self.reference: Logprobs | None = None  # the first endpoint's scores of the probe's text
        self._changed = asyncio.Condition()
        self._pace = Pace(teacher.client.requests_per_second)
        self._answered = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> int:
        """How many endpoints are there."""
        return sum(not endpoint.away for endpoint in self.endpoints)

    @property
    def in_flight(self) -> int:
        """Requests that wait for their reply."""
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    @property
    def complaints(self) -> list[str]:
        """Why each endpoint that is away is."""
        return [f"{endpoint.name}: {endpoint.away}" for endpoint in self.endpoints if endpoint.away]

    async def open(self, *, patient: bool) -> None:
        """Probe every endpoint. Those that do not answer are tried again later; one must answer, unless `patient`.

        Raises:
            UserError: an endpoint answers and cannot be this run's teacher, or none answers at all.
        """
        found = await asyncio.gather(*(self._inspect(endpoint) for endpoint in self.endpoints), return_exceptions=True)
        for endpoint, outcome in zip(self.endpoints, found, strict=True):
            if isinstance(outcome, EndpointFault | Refused):
                self._send_away(endpoint, str(outcome))
            elif outcome is not None:
                raise outcome
        if not patient and not self.serving:
            raise UserError(
                f"no endpoint of the teacher {self._model!r} answers ({'; '.join(self.complaints)})",
                expected=f"a server at {SECTION}.client.base_url",
                next_step="Start it, or correct the address; a server that is still loading its model needs more time.",
                exit=Exit.UNREACHABLE,
            )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score(self, request: ScoreRequest) -> Scored:
        """The scores of `request`; returns when some endpoint has given them, however long none is there.

        Raises:
            Refused: the server will not score this sample, or cannot although it scores others.
        """
        rounds = 0
        while True:
            answered = self._answered
            try:
                return await self._attempts(request)
            except EndpointFault as fault:
                rounds += self._answered > answered
                if rounds >= ROUNDS:
                    words = f"failed {rounds * (self._client.max_retries + 1)} times while other samples were scored; last: {fault}"
                    raise Refused(words) from fault
            await asyncio.sleep(self._client.breaker_pause * random.uniform(0.5, 1.5))

    async def _attempts(self, request: ScoreRequest) -> Scored:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._client.max_retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=tenacity.retry_if_exception_type(EndpointFault),
            reraise=True,
        )
        return await retrying(self._attempt, request)

    async def _attempt(self, request: ScoreRequest) -> Scored:
        async with self._turn() as endpoint:
            await self._pace.wait()
            try:
                scores = await self._ask(endpoint, request)
            except EndpointFault as fault:
                await self._count(endpoint, fault)
                raise
            except Refused as refusal:
                self._count_failure(endpoint, str(refusal))  # a server that refuses one sample after the other is probed
                raise Refused(f"{endpoint.name} refused it: {refusal}", status=refusal.status) from refusal
            endpoint.failures = 0
            self._answered += 1
            return Scored(scores, endpoint.name)

    async def _ask(self, endpoint: Endpoint, request: ScoreRequest) -> Scores:
        protocol = endpoint.protocol
        assert protocol is not None, "an endpoint that serves has been probed"
        if endpoint.context_tokens is not None and request.tokens + 1 > endpoint.context_tokens:
            raise Refused(f"{request.tokens} tokens, and one that scoring takes, exceed its context of {endpoint.context_tokens}")
        reply = await endpoint.post(protocol.path, protocol.body(self._model, request, self._top_k))
        return protocol.scores(reply, request, self._top_k)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Endpoint]:
        """The endpoint with the fewest requests in flight, as soon as one has room for another."""
        async with self._changed:
            await self._changed.wait_for(self._free)
            endpoint = min(self._free(), key=lambda free: (free.in_flight, random.random()))
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            await self._wake()

    def _free(self) -> list[Endpoint]:
        return [one for one in self.endpoints if not one.away and not one.resting and one.in_flight < self._client.max_in_flight]

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _count(self, endpoint: Endpoint, fault: EndpointFault) -> None:
        log.warning("the teacher failed a request", endpoint=endpoint.name, reason=str(fault))
        if fault.breaks:
            self._count_failure(endpoint, str(fault))
        if fault.retry_after_s:
            endpoint.rest_until = max(endpoint.rest_until, time.monotonic() + fault.retry_after_s)
            self._start(self._wake_at(endpoint))

    def _count_failure(self, endpoint: Endpoint, words: str) -> None:
        endpoint.failures += 1
        if endpoint.failures >= self._client.breaker_failures and not endpoint.away:
            self._send_away(endpoint, words)

    def _send_away(self, endpoint: Endpoint, words: str) -> None:
        endpoint.away = words
        log.warning("the endpoint is left alone", endpoint=endpoint.name, reason=words, pause_s=self._client.breaker_pause)
        self._start(self._bring_back(endpoint))

    async def _bring_back(self, endpoint: Endpoint) -> None:
        """Probe an endpoint that is away, pause by pause, until it passes."""
        while endpoint.away:
            await asyncio.sleep(self._client.breaker_pause * random.uniform(0.8, 1.2))
            try:
                await self._inspect(endpoint)
            except (EndpointFault, Refused, UserError) as error:
                endpoint.away = str(error)
            else:
                endpoint.away, endpoint.failures = "", 0
        log.info("the endpoint is back", endpoint=endpoint.name)
        await self._wake()

    async def _inspect(self, endpoint: Endpoint) -> None:
        """Probe `endpoint`, and compare it with those that were probed before."""
        logprobs = await self._probe(endpoint)
        if self.reference is None:
            self.reference = logprobs
        if (nats := distance(self.reference, logprobs)) > ALIKE_NATS:
            raise UserError(
                f"{endpoint.name} scores one text {nats:.3g} nats a token away from what this teacher scored it first",
                expected=f"at most {ALIKE_NATS:g}, from one teacher with the same weights everywhere",
                next_step=f"Serve {self._model!r} with the same weights at every address of {SECTION}.client.base_url.",
            )

    async def _wake_at(self, endpoint: Endpoint) -> None:
        await asyncio.sleep(max(0.0, endpoint.rest_until - time.monotonic()))
        await self._wake()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Pace:
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


def summary(pool: Pool) -> str:
    """What a worker with these endpoints waits for, in words; empty while all of them serve."""
    resting = [one for one in pool.endpoints if not one.away and one.resting]
    away = pool.complaints
    if not pool.serving:
        return f"waiting for the teacher: {'; '.join(away)}"
    if len(resting) == pool.serving:
        left_s = min(one.rest_until for one in resting) - time.monotonic()
        return f"the teacher asked to be left alone for another {max(0.0, left_s):.0f} s (Retry-After)"
    return f"{len(away)} of {len(pool.endpoints)} endpoints are away: {'; '.join(away)}" if away else ""
