"""One server: its address, how a request reaches it, and what its replies mean."""

from __future__ import annotations

import asyncio
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec

from onstream.pipeline.http.errors import BadReply, EndpointFault, RequestRefused
from onstream.pipeline.undecodable import UNDECODABLE
from onstream.settings.client import EndpointSettings

NOT_THE_QUESTIONS_FAULT = {401, 402, 403, 404, 405, 407, 408, 409, 421, 423, 425, 426, 429, 451}
"""Statuses 4xx that speak of the caller, the address or the moment; any other refuses the question
itself.
"""
WORDS_CHARACTERS = 300
MAX_RETRY_AFTER_S = 600.0


class Endpoint:
    """A server and how it has been doing.

    `away` says why nothing is sent to it, and is empty while it serves; on `trial` one request is,
    which is to show whether it is back. `failures` counts those in a row. It rests until
    `rest_until` (monotonic seconds), where it asked for that.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        self.name, self._root, self._api = addresses(base_url)
        self._http = http
        self._timeout_s = timeout_s
        self.in_flight = 0
        self.failures = 0
        self.rest_until = 0.0
        self.away = ""
        self.trial = False

    @property
    def rests_s(self) -> float:
        """For how long it still asked to be left alone."""
        return max(0.0, self.rest_until - time.monotonic())

    def rest(self, seconds: float | None) -> None:
        """Leave it alone for `seconds` from now, if that is longer than before."""
        self.rest_until = max(self.rest_until, time.monotonic() + (seconds or 0.0))

    def takes(self, most: int) -> int:
        """How many requests it may be given at once, where it is given `most` while all is well."""
        return int(self.trial) if self.away else most

    async def models(self) -> Any:
        """The reply of `/models`, decoded.

        Raises:
            EndpointFault, RequestRefused: there is none.
        """
        return decoded(await self._ask("GET", f"{self._api}/models"))

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The reply to `body` at `path`, from the server's root; those under `/v1/` are where the
        address has its OpenAI routes.

        Raises:
            EndpointFault: no reply, or one that says that the server could not; asking again may
                help.
            RequestRefused: the server will not have this body.
        """
        return await self._ask("POST", self._url(path), msgspec.json.encode(body))

    async def get(self, path: str) -> bytes:
        """The reply at `path`, with the same meaning and the same faults as of `post`."""
        return await self._ask("GET", self._url(path))

    def _url(self, path: str) -> str:
        return (
            self._api + path.removeprefix("/v1") if path.startswith("/v1/") else self._root + path
        )

    async def _ask(self, method: str, url: str, content: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json"} if content is not None else None
        try:
            async with asyncio.timeout(
                self._timeout_s
            ):  # httpx bounds each read alone: a slow drip would outlive it
                reply = await self._http.request(method, url, content=content, headers=headers)
        except TimeoutError as error:
            raise EndpointFault(f"no whole answer within {self._timeout_s:g} s") from error
        except httpx.TimeoutException as error:
            raise EndpointFault(f"{type(error).__name__} at {self.name}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointFault(
                f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            ) from error
        if not reply.is_success:
            raise _fault(reply)
        return reply.content


def addresses(base_url: str) -> tuple[str, str, str]:
    """The endpoint's name, the server's root and the address of its OpenAI routes, for a
    `base_url`.

    The name carries no password. A bare host has its OpenAI routes under `/v1`.

    >>> addresses("http://me:secret@host:8000/v1")
    ('http://host:8000/v1', 'http://me:secret@host:8000', 'http://me:secret@host:8000/v1')
    >>> addresses("http://host:8000")
    ('http://host:8000', 'http://host:8000', 'http://host:8000/v1')
    """
    parts = urlsplit(base_url)
    name = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if re.search(r"/v\d+$", parts.path):
        return name, base_url.rpartition("/")[0], base_url
    return name, base_url, base_url if parts.path else f"{base_url}/v1"


def decoded(reply: bytes) -> Any:
    """`reply` as JSON.

    Raises:
        BadReply: it is none, or it tells of an error, as gateways do whose own upstream failed.
    """
    try:
        body = msgspec.json.decode(reply)
    except UNDECODABLE as error:
        raise BadReply(f"a reply that is no JSON ({error})") from error
    if isinstance(body, dict) and body.get("error"):
        raise BadReply(f"an error in a reply that says success: {_said(body)}")
    return body


def _fault(reply: httpx.Response) -> EndpointFault | RequestRefused:
    status = reply.status_code
    words = f"{reply.status_code} {_words(reply)}"
    if 400 <= status < 500 and status not in NOT_THE_QUESTIONS_FAULT:
        return RequestRefused(words, status=status)
    retry_after_s = _retry_after_s(reply.headers.get("retry-after"), time.time())
    return EndpointFault(
        words,
        status=status,
        retry_after_s=retry_after_s,
        breaks=status != 429 and retry_after_s is None,
    )


def _words(reply: httpx.Response) -> str:
    try:
        said = _said(msgspec.json.decode(reply.content))
    except UNDECODABLE:
        said = _line(reply.text)
    return said or reply.reason_phrase


def _said(body: Any) -> str:
    """What the server says of its refusal, on one line; servers put it in one of three places."""
    if isinstance(body, dict):
        error = body.get("error", body)
        body = (
            error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
        )
    return _line(str(body))


def _line(words: str) -> str:
    return " ".join(words.split())[:WORDS_CHARACTERS]


def _retry_after_s(header: str | None, now: float) -> float | None:
    """The seconds that a `Retry-After` header asks for, as a number or as a date; None for none, or
    for nonsense.
    """
    if header is None:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", header):
        seconds = float(header)
    else:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except ValueError:
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def http_client(client: EndpointSettings) -> httpx.AsyncClient:
    """The HTTP client of all endpoints, with the settings' headers and key."""
    headers = {name: value.get_secret_value() for name, value in client.headers.items()}
    if client.api_key is not None:
        headers["authorization"] = f"Bearer {client.api_key.get_secret_value()}"
    connections = client.max_in_flight * max(1, len(client.base_url)) + len(client.base_url)
    return httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(client.timeout, connect=client.connect_timeout, pool=None),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
    )
