"""One server: its address, how a request reaches it, and what its replies mean."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec

from onstream.pipeline.errors import UserError
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.sections.client import EndpointSettings

NOT_THE_REQUESTS_FAULT = {401, 402, 403, 404, 405, 407, 408, 409, 421, 423, 425, 426, 429, 451}
"""Statuses 4xx about the caller, the address or the moment. Any other 4xx refuses the request."""
MESSAGE_CHARACTERS = 300
MAX_REPLY_BYTES = 256 << 20
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
MAX_RETRY_AFTER_S = 600.0
NAMES_SHOWN = 5
KEY_REFUSED = (401, 403)


class EndpointError(Exception):
    """A request without an answer.

    `status` is the reply's HTTP status; None where there was no reply, or where the reply was found
    wrong here.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointFault(EndpointError):
    """The endpoint failed, and the request is not the cause.

    It is worth sending again, there or elsewhere.

    `retry_after_s` is how long the server asked for no requests. `breaks` is False for a server
    that is only busy: this does not count towards its circuit breaker.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        breaks: bool = True,
    ) -> None:
        super().__init__(message, status=status)
        self.retry_after_s = retry_after_s
        self.breaks = breaks


class BadReply(EndpointFault):
    """A reply with a status of success and the wrong content."""


class RequestRefused(EndpointError):
    """The server refuses this request for its content.

    Sending it again would not help; another request may pass.
    """


class Endpoint:
    """A server and its state.

    `down` is the reason why nothing is sent to it, and empty while it serves. On `trial`, one
    request is sent all the same, to see whether it is back. `failures` counts failures in a row.
    Until `rest_until` (monotonic seconds) it gets nothing, because it asked for that. A reply of
    more than `max_reply_bytes`, unpacked, is not read to its end.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        self.name, self._root, self._api = addresses(base_url)
        self._http = http
        self._timeout_s = timeout_s
        self.max_reply_bytes = MAX_REPLY_BYTES
        self.in_flight = 0
        self.failures = 0
        self.rest_until = 0.0
        self.down = ""
        self.trial = False

    @property
    def rests_s(self) -> float:
        """How much longer it asked for no requests."""
        return max(0.0, self.rest_until - time.monotonic())

    def rest(self, seconds: float | None) -> None:
        """Send it nothing for `seconds` from now, if that is longer than before."""
        self.rest_until = max(self.rest_until, time.monotonic() + (seconds or 0.0))

    def takes(self, most: int) -> int:
        """How many requests it may have at once: `most`, or fewer while it is down."""
        return int(self.trial) if self.down else most

    async def models(self) -> Any:
        """The reply of `/models`, decoded.

        Raises:
            EndpointFault, RequestRefused: there is none.
        """
        return decoded(await self._ask("GET", f"{self._api}/models"))

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The reply to `body` at `path` from the server's root.

        Paths under `/v1/` are taken from where the address has its OpenAI routes.

        Raises:
            EndpointFault: no reply, or one of a server that failed; another try may help.
            RequestRefused: the server refuses this body.
        """
        return await self._ask("POST", self._url(path), msgspec.json.encode(body))

    async def get(self, path: str) -> bytes:
        """The reply at `path`, with the same rules and errors as `post`."""
        return await self._ask("GET", self._url(path))

    def _url(self, path: str) -> str:
        if path.startswith("/v1/"):
            return self._api + path.removeprefix("/v1")
        return self._root + path

    async def _ask(self, method: str, url: str, content: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json"} if content is not None else None
        try:
            # httpx bounds each single read; bytes that trickle in would outlive its limit
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.stream(method, url, content=content, headers=headers) as reply,
            ):
                body = await body_of(reply, self.max_reply_bytes)
        except TimeoutError as error:
            raise EndpointFault(f"no whole answer within {self._timeout_s:g} s") from error
        except httpx.TimeoutException as error:
            raise EndpointFault(f"{type(error).__name__} at {self.name}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            name = type(error).__name__
            raise EndpointFault(f"{name}: {error}" if str(error) else name) from error
        if not reply.is_success:
            raise _fault(reply, body)
        return body


async def body_of(reply: httpx.Response, max_bytes: int) -> bytes:
    """The body of `reply`, unpacked.

    httpx unpacks a piece of a reply at once, however much comes out of it. This never holds more
    than `max_bytes` and one piece.

    Raises:
        BadReply: it has more, or is packed in another way than was asked for.
    """
    encoding = reply.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "deflate"):
        raise BadReply(f"a reply packed as {encoding[:40]!r}; expected gzip, deflate or none")
    unpacker = zlib.decompressobj(GZIP_OR_ZLIB) if encoding in ("gzip", "deflate") else None
    body = bytearray()
    try:
        async for piece in reply.aiter_raw():
            room = max_bytes + 1 - len(body)
            body += piece[:room] if unpacker is None else unpacker.decompress(piece, room)
            if len(body) > max_bytes:
                raise BadReply(
                    f"a reply of more than {max_bytes >> 20} MiB, which `client.max_reply` allows"
                )
    except zlib.error as error:
        raise BadReply(f"a reply that is not {encoding} ({error})") from error
    return bytes(body)


def addresses(base_url: str) -> tuple[str, str, str]:
    """The endpoint's name, the server's root, and the address of its OpenAI routes.

    The name is `base_url` without a password. A bare host has its OpenAI routes under `/v1`.

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
        BadReply: it is not JSON, or reports an error, as gateways do when their own server failed.
    """
    try:
        body = msgspec.json.decode(reply)
    except UNDECODABLE as error:
        raise BadReply(f"a reply that is not JSON ({error})") from error
    if isinstance(body, dict) and body.get("error"):
        raise BadReply(f"an error in a reply with a status of success: {_message(body)}")
    return body


def _fault(reply: httpx.Response, body: bytes) -> EndpointFault | RequestRefused:
    status = reply.status_code
    message = f"{status} {_reply_message(body) or reply.reason_phrase}"
    if 400 <= status < 500 and status not in NOT_THE_REQUESTS_FAULT:
        return RequestRefused(message, status=status)
    retry_after_s = _retry_after_s(reply.headers.get("retry-after"), time.time())
    return EndpointFault(
        message,
        status=status,
        retry_after_s=retry_after_s,
        breaks=status != 429 and retry_after_s is None,
    )


def _reply_message(body: bytes) -> str:
    try:
        return _message(msgspec.json.decode(body))
    except UNDECODABLE:
        return _line(body[: 4 * MESSAGE_CHARACTERS].decode(errors="replace"))


def _message(body: Any) -> str:
    """The server's message about an error, on one line. Servers put it in one of three places."""
    if isinstance(body, dict):
        body = body.get("error", body)
    if isinstance(body, dict):
        body = body.get("message", body.get("detail", body))
    return _line(str(body))


def _line(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_CHARACTERS]


def _retry_after_s(header: str | None, now: float) -> float | None:
    """The seconds that a `Retry-After` header asks for, by a number or a date.

    None where there is no such header, or no sense in it.
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
    """An HTTP client for all endpoints, with the settings' headers and key."""
    headers = {"accept-encoding": "gzip, deflate"}  # which `body_of` unpacks
    headers |= {name: value.get_secret_value() for name, value in client.headers.items()}
    if client.api_key is not None:
        headers["authorization"] = f"Bearer {client.api_key.get_secret_value()}"
    connections = client.max_in_flight * max(1, len(client.base_url)) + len(client.base_url)
    return httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(client.timeout, connect=client.connect_timeout, pool=None),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
    )


async def require_model(
    endpoint: Endpoint, model: str, section: str, named: str = ""
) -> dict[str, Any]:
    """The entry of `model` in the endpoint's list of models.

    Messages name the endpoint's settings by `section`, and the setting with the model's name by
    `named`, by default `section`.model.name.

    Raises:
        UserError: the endpoint refuses the key, has no list, or does not list the model.
        EndpointFault: it did not answer.
    """
    listing = await _listing(endpoint, section)
    entries = listing.get("data") if isinstance(listing, dict) else None
    models = {
        entry["id"]: entry for entry in entries or () if isinstance(entry, dict) and "id" in entry
    }
    if model in models:
        return dict(models[model])
    names = ", ".join(repr(name) for name in list(models)[:NAMES_SHOWN]) or "none"
    more = f" and {len(models) - NAMES_SHOWN} more" if len(models) > NAMES_SHOWN else ""
    setting = named or f"{section}.model.name"
    raise UserError(
        f"{setting} = {model!r}, which {endpoint.name} does not serve",
        expected=f"one of the models it lists: {names}{more}",
        next_step=f"Correct the name. Where the list is not complete, set "
        f"{section}.client.skip_model_check = true.",
    )


async def _listing(endpoint: Endpoint, section: str) -> Any:
    try:
        return await endpoint.models()
    except EndpointError as error:
        if error.status in KEY_REFUSED:
            raise key_refused(endpoint, error, section) from error
        if not isinstance(error, BadReply) and _may_pass(error.status):
            raise
        raise UserError(
            f"{endpoint.name} has no list of models ({error})",
            expected="an OpenAI-compatible address, which usually ends in /v1",
            next_step=f"Correct {section}.client.base_url, or set "
            f"{section}.client.skip_model_check = true.",
        ) from error


def _may_pass(status: int | None) -> bool:
    """Whether the endpoint may have a list all the same, once its trouble is over."""
    return status is None or status >= 500 or status in (408, 429)


def key_refused(endpoint: Endpoint, error: Exception, section: str) -> UserError:
    """The error for an endpoint that wants another key."""
    variable = "ONSTREAM_" + section.replace(".", "__").upper() + "__CLIENT__API_KEY"
    return UserError(
        f"{endpoint.name} refuses this worker ({error})",
        expected="a key or headers that it accepts",
        next_step=f"Set {section}.client.api_key ({variable}) or {section}.client.headers.",
    )
