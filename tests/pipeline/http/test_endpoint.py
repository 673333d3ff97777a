from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from onstream.pipeline.http import (
    BadReply,
    Endpoint,
    EndpointFault,
    EndpointPool,
    RequestRefused,
    decoded,
)
from onstream.pipeline.http.endpoint import MAX_RETRY_AFTER_S, addresses, http_client
from onstream.settings.sections.client import ClientSettings
from tests.faulty_server import Answer, FaultyServer, cut, drip, status


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer(lambda body: Answer(body={"text": "x" * 1000})).start()
    yield server
    server.stop()


def ask(url: str, timeout_s: float = 2.0, **client: object) -> bytes:
    async def once() -> bytes:
        async with http_client(
            ClientSettings.model_validate({"connect_timeout": 0.5, **client})
        ) as http:
            return await Endpoint(url, http, timeout_s).post("/generate", {"model": "teacher"})

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://host:8000/v1", ("http://host:8000/v1", "http://host:8000", "http://host:8000/v1")),
        ("http://host:8000", ("http://host:8000", "http://host:8000", "http://host:8000/v1")),
        ("https://host/api/v1", ("https://host/api/v1", "https://host/api", "https://host/api/v1")),
        (
            "https://host/openai",
            ("https://host/openai", "https://host/openai", "https://host/openai"),
        ),
        (
            "http://me:secret@host/v1",
            ("http://host/v1", "http://me:secret@host", "http://me:secret@host/v1"),
        ),
    ],
)
def test_an_address_names_the_servers_root_and_its_openai_routes(
    base_url: str, expected: tuple[str, str, str]
) -> None:
    assert addresses(base_url) == expected


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_status_about_the_request_refuses_it_with_the_servers_words(
    server: FaultyServer, code: int
) -> None:
    server.faults.append(status(code, "this one I will not have"))
    with pytest.raises(RequestRefused, match=f"^{code} this one I will not have$") as refusal:
        ask(server.base_url)
    assert refusal.value.status == code


@pytest.mark.parametrize(
    ("code", "breaks"),
    [(401, True), (403, True), (404, True), (429, False), (500, True), (503, True)],
)
def test_any_other_status_is_the_endpoints_fault(
    server: FaultyServer, code: int, breaks: bool
) -> None:
    server.faults.append(status(code))
    with pytest.raises(EndpointFault, match=f"^{code} out of order$") as fault:
        ask(server.base_url)
    assert (fault.value.status, fault.value.breaks, fault.value.retry_after_s) == (
        code,
        breaks,
        None,
    )


def test_retry_after_is_read_as_seconds_and_as_a_date_and_bounded(server: FaultyServer) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.faults.extend(
        status(503, retry_after=header) for header in ("7", soon, "9999999", "soon")
    )
    found = []
    for _ in range(4):
        with pytest.raises(EndpointFault) as fault:
            ask(server.base_url)
        found.append((fault.value.retry_after_s, fault.value.breaks))
    assert found[0] == (7, False)
    assert 25 < (found[1][0] or 0) <= 30
    assert found[2:] == [(MAX_RETRY_AFTER_S, False), (None, True)]


def test_a_connection_cut_in_the_middle_of_a_reply_is_the_endpoints_fault(
    server: FaultyServer,
) -> None:
    server.faults.append(cut)
    with pytest.raises(EndpointFault, match="RemoteProtocolError"):
        ask(server.base_url)


def test_a_reply_that_drips_is_cut_off_by_the_bound_of_the_whole_request(
    server: FaultyServer,
) -> None:
    server.faults.append(drip)
    with pytest.raises(EndpointFault, match=r"no whole answer within 0\.3 s"):
        ask(server.base_url, timeout_s=0.3)


def test_nothing_at_the_address_is_the_endpoints_fault() -> None:
    with pytest.raises(EndpointFault, match="ConnectError"):
        ask("http://127.0.0.1:1/v1")


def test_the_key_and_the_headers_are_sent_and_not_shown(server: FaultyServer) -> None:
    server.key = "s3cret"
    with pytest.raises(EndpointFault, match="401 Unauthorized"):
        ask(server.base_url)
    assert ask(server.base_url, api_key="s3cret") == ask(
        server.base_url, headers={"authorization": "Bearer s3cret"}
    )
    assert "s3cret" not in repr(ClientSettings(api_key="s3cret", headers={"x": "s3cret"}))  # type: ignore[arg-type]


def test_openai_routes_are_where_the_address_has_them_and_others_at_the_servers_root(
    server: FaultyServer,
) -> None:
    async def both() -> None:
        async with http_client(ClientSettings()) as http:
            endpoint = Endpoint(f"http://127.0.0.1:{server.port}/api/v1", http, 2.0)
            await endpoint.post("/v1/chat/completions", {})
            await endpoint.post("/tokenize", {})

    asyncio.run(both())
    assert [asked.path for asked in server.asked] == ["/api/v1/chat/completions", "/api/tokenize"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"<html>", "a reply that is not JSON"),
        (
            b'{"error": {"message": "upstream\\ndied"}}',
            "^an error in a reply with a status of success: upstream died$",
        ),
    ],
)
def test_a_success_that_is_none_is_the_endpoints_fault(reply: bytes, words: str) -> None:
    with pytest.raises(BadReply, match=words):
        decoded(reply)


def test_a_packed_reply_is_unpacked(server: FaultyServer) -> None:
    for packed, encoding in ((gzip.compress, "gzip"), (zlib.compress, "deflate")):
        answer = Answer(body=packed(b'{"text": "hello"}'), headers={"Content-Encoding": encoding})
        server.faults.append(lambda asked, right, answer=answer: answer)
        assert ask(server.base_url) == b'{"text": "hello"}'


@pytest.mark.parametrize("code", [200, 500])
def test_a_reply_that_unfolds_past_its_bound_is_not_read_to_its_end(
    server: FaultyServer, code: int
) -> None:
    bomb = Answer(code, gzip.compress(bytes(256 << 20)), {"Content-Encoding": "gzip"})
    server.faults.append(lambda asked, right: bomb)

    async def once() -> None:
        async with http_client(ClientSettings()) as http:
            endpoint = Endpoint(server.base_url, http, 30.0)
            endpoint.max_reply_bytes = 1 << 20
            await endpoint.post("/generate", {})

    tracemalloc.start()
    with pytest.raises(BadReply, match="more than 1 MiB"):
        asyncio.run(once())
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 16 << 20


def test_a_reply_that_is_packed_in_a_way_that_nobody_asked_for_is_the_endpoints_fault(
    server: FaultyServer,
) -> None:
    for encoding, words in (("zstd", "packed as 'zstd'"), ("gzip", "not gzip")):
        answer = Answer(body=b"nothing packed", headers={"Content-Encoding": encoding})
        server.faults.append(lambda asked, right, answer=answer: answer)
        with pytest.raises(BadReply, match=words):
            ask(server.base_url)


def test_the_bound_of_a_reply_is_a_setting() -> None:
    async def bounds() -> list[int]:
        client = ClientSettings.model_validate(
            {"base_url": ["http://a", "http://b"], "max_reply": 2}
        )

        async def check(endpoint: Endpoint) -> None:
            raise AssertionError

        pool = EndpointPool(client, Endpoint, model="m", section="s", check=check, conclusive=False)
        await pool.close()
        return [endpoint.max_reply_bytes for endpoint in pool.endpoints]

    assert asyncio.run(bounds()) == [2 << 20, 2 << 20]
