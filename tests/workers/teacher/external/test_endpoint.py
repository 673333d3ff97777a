from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from settings.client import ClientSettings
from tests.faulty_server import FaultyServer, cut, drip, status
from tests.workers.teacher.external.conftest import Servers
from workers.teacher.external.endpoint import MAX_RETRY_AFTER_S, Endpoint, addresses, http_client
from workers.teacher.external.faults import EndpointFault, Refused


def ask(server: FaultyServer, timeout_s: float = 2.0, **client: object) -> bytes:
    async def once() -> bytes:
        async with http_client(ClientSettings.model_validate({"connect_timeout": 0.5, **client})) as http:
            body = {"model": "teacher", "token_ids": [20, 30], "sampling_params": {"prompt_logprobs": 0}}
            return await Endpoint(server.base_url, http, timeout_s).post("/inference/v1/generate", body)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://host:8000/v1", ("http://host:8000/v1", "http://host:8000", "http://host:8000/v1")),
        ("http://host:8000", ("http://host:8000", "http://host:8000", "http://host:8000/v1")),
        ("https://host/api/v1", ("https://host/api/v1", "https://host/api", "https://host/api/v1")),
        ("https://host/openai", ("https://host/openai", "https://host/openai", "https://host/openai")),
        ("http://me:secret@host/v1", ("http://host/v1", "http://me:secret@host", "http://me:secret@host/v1")),
    ],
)
def test_an_address_names_the_servers_root_and_its_openai_routes(base_url: str, expected: tuple[str, str, str]) -> None:
    assert addresses(base_url) == expected


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_status_about_the_request_refuses_the_sample_with_the_servers_words(servers: Servers, code: int) -> None:
    server = servers()
    server.faults.append(status(code, "this one I will not have"))
    with pytest.raises(Refused, match=f"^{code} this one I will not have$") as refusal:
        ask(server)
    assert refusal.value.status == code


@pytest.mark.parametrize(("code", "breaks"), [(401, True), (404, True), (429, False), (500, True), (503, True)])
def test_any_other_status_is_the_endpoints_fault(servers: Servers, code: int, breaks: bool) -> None:
    server = servers()
    server.faults.append(status(code))
    with pytest.raises(EndpointFault, match=f"^{code} out of order$") as fault:
        ask(server)
    assert (fault.value.status, fault.value.breaks, fault.value.retry_after_s) == (code, breaks, None)


def test_retry_after_is_read_as_seconds_and_as_a_date_and_bounded(servers: Servers) -> None:
    server = servers()
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.faults.extend(status(503, retry_after=header) for header in ("7", soon, "9999999", "soon"))
    found = []
    for _ in range(4):
        with pytest.raises(EndpointFault) as fault:
            ask(server)
        found.append((fault.value.retry_after_s, fault.value.breaks))
    assert found[0] == (7, False)
    assert 25 < (found[1][0] or 0) <= 30
    assert found[2:] == [(MAX_RETRY_AFTER_S, False), (None, True)]


def test_a_connection_cut_in_the_middle_of_a_reply_is_the_endpoints_fault(servers: Servers) -> None:
    server = servers()
    server.faults.append(cut)
    with pytest.raises(EndpointFault, match="RemoteProtocolError"):
        ask(server)


def test_a_reply_that_drips_is_cut_off_by_the_bound_of_the_whole_request(servers: Servers) -> None:
    server = servers()
    server.faults.append(drip)
    with pytest.raises(EndpointFault, match=r"no whole answer within 0\.3 s"):
        ask(server, timeout_s=0.3)


def test_nothing_at_the_address_is_the_endpoints_fault() -> None:
    with pytest.raises(EndpointFault, match="ConnectError"):
        ask(FaultyServer(port=1))


def test_the_key_and_the_headers_are_sent_and_not_shown(servers: Servers) -> None:
    server = servers(key="s3cret")
    with pytest.raises(EndpointFault, match="401 Unauthorized"):
        ask(server)
    assert ask(server, api_key="s3cret") == ask(server, headers={"authorization": "Bearer s3cret"})
    assert "s3cret" not in repr(ClientSettings(api_key="s3cret", headers={"x": "s3cret"}))  # type: ignore[arg-type]
