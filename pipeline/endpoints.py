"""HTTP endpoints that fail now and then: requests go where least is in flight, are sent again, and wait for breakers and budgets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from pipeline.errors import Exit, UserError
from settings.client import ClientSettings

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 20.0
LONGEST_RETRY_AFTER_S = 600.0
_PASSING = frozenset((408, 409, 423, 425, 429))  # beside 5xx: the same request may succeed later
_ACCESS = frozenset((401, 402, 403, 404, 405, 407, 421, 426, 451))  # concern every request, so no rollout is to blame
_WORDS_CHARACTERS = 400


class EndpointError(Exception):
    """A request that was not answered."""


class Refused(EndpointError):
    """The endpoint refused this request for what it says; another one may pass. `status` is 4xx."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"refused with status {status}: {words}")
        self.status, self.words = status, words


class Unavailable(EndpointError):
    """The endpoints failed, for whatever was asked. The same request may be sent again later. `status` is None where none answered."""

    def __init__(self, words: str, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status


@dataclass
class Endpoint:
    """One base URL and how it has been doing."""

    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    closed_until: float = 0.0  # by the monotonic clock; nothing is sent before
    trial: bool = False  # after a pause: one request tries it
    error: str = ""  # the last failure since its last success

    def free(self, now: float, most: int) -> bool:
        """Whether a request may be sent to it now."""
        return now >= self.closed_until and self.in_flight < (1 if self.trial else most)


@dataclass
class Usage:
    """What was asked of the endpoints so far."""

    requests: int = 0
    failures: int = 0
    tokens: int = 0
    by_url: dict[str, int] = field(default_factory=dict)  # answered requests


class Endpoints:
    """Base URLs that serve the same model, asked through one connection pool; for one event loop.

    `setting` is the dotted name of the section that they come from, for messages.
    """

    def __init__(self, client: ClientSettings, setting: str) -> None:
        self.client, self.setting = client, setting
        self.usage = Usage()
        self.endpoints = [Endpoint(url) for url in client.base_url]
        self._free = asyncio.Condition()
        self._next_send = 0.0
        headers = {name: value.get_secret_value() for name, value in client.headers.items()}
        if client.api_key is not None:
            headers["Authorization"] = f"Bearer {client.api_key.get_secret_value()}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.capacity)
        timeout = httpx.Timeout(client.timeout, connect=client.connect_timeout, pool=None)
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout)

    @property
    def capacity(self) -> int:
        """Requests that all endpoints together take at once."""
        return self.client.max_in_flight * len(self.endpoints)

    @property
    def in_flight(self) -> int:
        """Requests that wait for an answer now."""
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    @property
    def problem(self) -> str:
        """Why nothing can be sent now, in words; empty while any endpoint is open."""
        if self.client.max_tokens_per_run is not None and self.usage.tokens >= self.client.max_tokens_per_run:
            return (
                f"has spent {self.usage.tokens} tokens of {self.setting}.client.max_tokens_per_run = {self.client.max_tokens_per_run}; "
                "raise it and start the worker again"
            )
        now = time.monotonic()
        if any(now >= endpoint.closed_until and not endpoint.trial for endpoint in self.endpoints):
            return ""
        return "waits for " + "; ".join(f"{endpoint.url} ({endpoint.error})" for endpoint in self.endpoints)

    async def get(self, endpoint: Endpoint, path: str) -> Any:
        """The JSON at `path` of one endpoint, asked once.

        Raises:
            Refused, Unavailable: it did not answer with JSON.
        """
        return await self._send(endpoint, "GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer of the least busy endpoint to `body`. Failures that pass are tried again, at whichever endpoint is free.

        Raises:
            Refused: an endpoint refused what the request says.
            Unavailable: all attempts failed.
        """
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_attempt(self.client.max_retries + 1),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                await self._keep_rate()
                async with self._slot() as endpoint:
                    return await self.ask(endpoint, path, body)
        raise AssertionError("tenacity returns or raises")

    async def ask(self, endpoint: Endpoint, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer of this one endpoint, asked once; for `post`, and for probes of each endpoint.

        Raises:
            Refused, Unavailable: it did not answer with JSON.
        """
        self.usage.requests += 1
        try:
            answer = await self._send(endpoint, "POST", path, body)
        except Unavailable as error:
            self._failed(endpoint, error)
            raise
        endpoint.failures, endpoint.trial, endpoint.error = 0, False, ""
        self.usage.by_url[endpoint.url] = self.usage.by_url.get(endpoint.url, 0) + 1
        self.usage.tokens += _tokens_of(answer)
        return answer

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def require_model(self, model: str) -> None:
        """Do nothing where an endpoint is up and every one that is up lists `model`, or `skip_model_check` is set.

        Raises:
            UserError: none is up, one refuses access, or one does not list the model.
        """
        if self.client.skip_model_check:
            return
        problems: list[str] = []
        for endpoint in self.endpoints:
            try:
                listed = [str(entry["id"]) for entry in (await self.get(endpoint, "/models"))["data"]]
            except Unavailable as error:
                if error.status is not None:
                    raise self._no_list(endpoint, error) from error
                problems.append(f"{endpoint.url}: {error}")
                continue
            except (EndpointError, KeyError, TypeError) as error:
                raise self._no_list(endpoint, error) from error
            if model not in listed:
                raise self._not_listed(endpoint, model, listed)
        if len(problems) == len(self.endpoints):
            raise UserError(
                f"no endpoint of {self.setting}.client.base_url answers ({'; '.join(problems)})",
                expected="at least one that is up",
                next_step="Start it, or correct the address.",
                exit=Exit.UNREACHABLE,
            )

    def _no_list(self, endpoint: Endpoint, error: Exception) -> UserError:
        return UserError(
            f"{endpoint.url}/models gives no list of models ({type(error).__name__}: {error})",
            expected="the models that it serves",
            next_step=f"Check the address (it ends in /v1 for most servers) and {self.setting}.client.api_key; "
            f"{self.setting}.client.skip_model_check = true does without the list.",
        )

    def _not_listed(self, endpoint: Endpoint, model: str, listed: list[str]) -> UserError:
        names = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
        return UserError(
            f"{endpoint.url} does not list the model {model!r} of {self.setting}.model.name; it lists {names or 'none'}",
            expected="a model that it serves",
            next_step=f"Set {self.setting}.model.name to one of them, or {self.setting}.client.skip_model_check = true.",
        )

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[Endpoint]:
        """An endpoint that takes a request now, the one with the fewest in flight; waits until there is one."""
        async with self._free:
            while (endpoint := self._open()) is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._free.wait(), self._until_open_s())
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            async with self._free:
                self._free.notify_all()  # a trial that succeeded makes room for many

    def _open(self) -> Endpoint | None:
        now = time.monotonic()
        free = [endpoint for endpoint in self.endpoints if endpoint.free(now, self.client.max_in_flight)]
        return min(free, key=lambda endpoint: endpoint.in_flight, default=None)

    def _until_open_s(self) -> float | None:
        """Until the next pause ends; None where no endpoint pauses, so that only an answer makes room."""
        now = time.monotonic()
        return min((endpoint.closed_until - now for endpoint in self.endpoints if endpoint.closed_until > now), default=None)

    async def _keep_rate(self) -> None:
        """Wait for this worker's turn under `requests_per_second`."""
        if self.client.requests_per_second is not None:
            now = time.monotonic()
            turn = max(now, self._next_send)
            self._next_send = turn + 1 / self.client.requests_per_second
            await asyncio.sleep(turn - now)

    async def _send(self, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            # httpx bounds each read; a server that drips its answer is bounded here.
            async with asyncio.timeout(self.client.timeout):
                response = await self._http.request(method, endpoint.url + path, json=body)
        except TimeoutError as error:
            raise Unavailable(f"no answer within {self.client.timeout:g} s") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        return self._answer(endpoint, response)

    def _answer(self, endpoint: Endpoint, response: httpx.Response) -> Any:
        status = response.status_code
        if status in _PASSING or status >= 500 or status in _ACCESS:
            if (pause_s := _retry_after_s(response)) is not None:
                endpoint.closed_until = max(endpoint.closed_until, time.monotonic() + pause_s)
            raise Unavailable(f"status {status}: {_words(response)}", status)
        if not response.is_success:
            raise Refused(status, _words(response))
        try:
            body = response.json()
        except ValueError as error:
            raise Unavailable(f"status {status}, but no JSON: {_words(response)}", status) from error
        if isinstance(body, dict) and body.get("error"):  # as gateways do whose own upstream failed
            raise Unavailable(f"status {status}, but an error: {_words(response)}", status)
        return body

    def _failed(self, endpoint: Endpoint, error: Unavailable) -> None:
        """Count a failure; open the breaker where they come in a row, or where the trial failed."""
        self.usage.failures += 1
        endpoint.failures += 1
        endpoint.error = str(error)
        if endpoint.trial or endpoint.failures >= self.client.breaker_failures:
            endpoint.trial = True
            endpoint.closed_until = max(endpoint.closed_until, time.monotonic() + self.client.breaker_pause)


def _words(response: httpx.Response) -> str:
    """What the server says, on one line: its JSON error message if it has one, else its text."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        said = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        said = response.text
    return " ".join(str(said).split())[:_WORDS_CHARACTERS] or "no words"


def _retry_after_s(response: httpx.Response) -> float | None:
    """The pause that the server asks for, in seconds; it may give seconds or a date."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S)


def _tokens_of(answer: Any) -> int:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0
