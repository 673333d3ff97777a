"""Requests to endpoints that fail, are slow, ask for patience, leave and come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from pipeline import endpoints
from pipeline.endpoints import Endpoints, Refused, Unavailable
from pipeline.errors import Exit, UserError
from settings.client import ClientSettings
from tests.faulty import Answer, Body, serving

FINE = Answer(body={"ok": True, "usage": {"total_tokens": 7}})
GONE = "http://127.0.0.1:9/v1"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_WAIT_S", 0.001)


def client(*urls: str, **fields: Any) -> ClientSettings:
    return ClientSettings.model_validate({"base_url": list(urls), "timeout": 5.0, "breaker_pause": 0.1, **fields})


def ask(settings: ClientSettings, use: Callable[[Endpoints], Any]) -> Any:
    """What `use`, a coroutine function, returns with endpoints of `settings`."""

    async def run() -> Any:
        made = Endpoints(settings, "orchestrator.teacher_rollout_model")
        try:
            return await use(made)
        finally:
            await made.close()

    return asyncio.run(run())


def post(made: Endpoints) -> Any:
    return made.post("/chat/completions", {"question": 1})


def in_turn(*answers: Answer) -> Callable[[Body], Answer]:
    """Each answer once, then the last one for ever."""
    rest: Iterator[Answer] = iter(answers)
    return lambda body: next(rest, answers[-1])


@pytest.mark.parametrize(
    "fault",
    [
        Answer(500, {"error": "boom"}),
        Answer(503, b"overloaded"),
        Answer(429, {"error": {"message": "slow down"}}),
        Answer(401, {"error": {"message": "bad key"}}),
        Answer(200, b"<html>"),
        Answer(200, {"error": {"message": "upstream died"}}),
        Answer(200, {"long": "x" * 4000}, cut=True),
    ],
    ids=["500", "503", "429", "401", "no JSON", "an error under status 200", "cut connection"],
)
def test_a_fault_of_the_server_is_asked_again(fault: Answer) -> None:
    with serving(in_turn(fault, fault, FINE)) as (server, url):
        assert ask(client(url), post) == FINE.body
        assert server.bodies == [{"question": 1}] * 3


def test_a_server_that_keeps_failing_is_unavailable_after_max_retries() -> None:
    with serving(in_turn(Answer(500, {"error": "boom"}))) as (server, url):
        with pytest.raises(Unavailable, match="status 500: boom"):
            ask(client(url, max_retries=2), post)
        assert len(server.bodies) == 3


def test_a_request_that_is_refused_is_not_asked_again_and_has_the_servers_words() -> None:
    with serving(in_turn(Answer(400, {"error": {"message": "prompt of 9 tokens,\nmaximum 8"}}))) as (server, url):
        with pytest.raises(Refused, match="refused with status 400: prompt of 9 tokens, maximum 8"):
            ask(client(url), post)
        assert len(server.bodies) == 1


def test_a_slow_drip_ends_at_the_timeout() -> None:
    with serving(in_turn(Answer(200, {"x": "y" * 1000}, drip_s=0.02), FINE)) as (_, url):
        started = time.monotonic()
        assert ask(client(url, timeout=0.3), post) == FINE.body
        assert 0.3 <= time.monotonic() - started < 3


@pytest.mark.parametrize("wait", ["0.4", None], ids=["seconds", "date"])
def test_retry_after_is_kept(wait: str | None) -> None:
    # A date has whole seconds, so it says between one and two from now.
    value = wait or formatdate(time.time() + 2, usegmt=True)
    with serving(in_turn(Answer(429, {}, {"Retry-After": value}), FINE)) as (server, url):
        assert ask(client(url), post) == FINE.body
        pause = server.asked[1].at - server.asked[0].at
        assert pause >= (0.4 if wait else 0.9)


def test_requests_go_to_the_endpoint_with_the_fewest_in_flight() -> None:
    release, arrived = threading.Event(), threading.Event()

    def slow(body: Body) -> Answer:
        arrived.set()
        release.wait(5)
        return FINE

    def last(body: Body) -> Answer:
        if len(quick.bodies) == 8:
            release.set()
        return FINE

    with serving(slow) as (held, first_url), serving(last) as (quick, second_url):

        async def use(made: Endpoints) -> int:
            first = [asyncio.create_task(post(made)) for _ in range(2)]
            await asyncio.to_thread(arrived.wait, 5)
            await first[1]
            for _ in range(7):
                await post(made)  # one is in flight at the slow one, none at the other
            await first[0]
            return made.in_flight

        assert ask(client(first_url, second_url), use) == 0
        assert (len(held.bodies), len(quick.bodies)) == (1, 8)


def test_one_endpoint_is_given_no_more_than_max_in_flight() -> None:
    def slowly(body: Body) -> Answer:
        time.sleep(0.02)
        return FINE

    async def use(made: Endpoints) -> None:
        await asyncio.gather(*(post(made) for _ in range(12)))

    with serving(slowly) as (server, url):
        ask(client(url, max_in_flight=3), use)
        assert server.most == 3


def test_the_breaker_leaves_a_failing_endpoint_alone_and_lets_one_request_try_it() -> None:
    broken = Answer(500, {"error": "boom"})
    with serving(in_turn(broken, broken, broken, FINE)) as (server, url):

        async def use(made: Endpoints) -> list[str]:
            problems = []
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await post(made)
                problems.append(made.problem)
            await asyncio.gather(*(post(made) for _ in range(4)))
            return [*problems, made.problem]

        problems = ask(client(url, max_retries=0, breaker_failures=2, breaker_pause=0.3), use)
        assert problems == ["", *[f"waits for {url} (status 500: boom)"] * 2, ""]
        times = [asked.at for asked in server.asked]
        assert times[2] - times[1] >= 0.3, "the pause before the trial"
        assert times[3] - times[2] >= 0.3, "a trial that fails opens it again"
        assert len(times) == 7


def test_after_the_trial_all_that_waited_go_on_together() -> None:
    def slowly(body: Body) -> Answer:
        if len(server.bodies) == 1:
            return Answer(500, {"error": "boom"})
        time.sleep(0.02)
        return FINE

    async def use(made: Endpoints) -> None:
        with pytest.raises(Unavailable):
            await post(made)
        await asyncio.gather(*(post(made) for _ in range(9)))

    with serving(slowly) as (server, url):
        ask(client(url, breaker_failures=1, max_retries=0, max_in_flight=4), use)
        assert server.most == 4


def test_an_endpoint_that_is_gone_does_not_hold_up_the_others() -> None:
    async def use(made: Endpoints) -> Any:
        await asyncio.gather(*(post(made) for _ in range(10)))
        return made.usage.by_url, made.problem

    with serving(in_turn(FINE)) as (_, url):
        by_url, problem = ask(client(GONE, url, breaker_failures=1, breaker_pause=60), use)
        assert by_url == {url: 10}
        assert problem == ""


def test_requests_per_second_is_kept() -> None:
    async def use(made: Endpoints) -> None:
        await asyncio.gather(*(post(made) for _ in range(6)))

    with serving(in_turn(FINE)) as (server, url):
        ask(client(url, requests_per_second=20), use)
        times = sorted(asked.at for asked in server.asked)
        assert times[-1] - times[0] >= 0.2


def test_a_spent_budget_is_named() -> None:
    async def use(made: Endpoints) -> list[str]:
        problems = []
        for _ in range(2):
            await post(made)
            problems.append(made.problem)
        return problems

    with serving(in_turn(FINE)) as (_, url):
        before, after = ask(client(url, max_tokens_per_run=14), use)
        assert before == ""
        assert "14 tokens of orchestrator.teacher_rollout_model.client.max_tokens_per_run = 14" in after


def test_the_key_and_the_headers_are_sent() -> None:
    with serving(in_turn(FINE)) as (server, url):
        ask(client(url, api_key="secret", headers={"X-Team": "blue"}), post)
        assert server.asked[0].headers["Authorization"] == "Bearer secret"
        assert server.asked[0].headers["X-Team"] == "blue"
        assert server.asked[0].path == "/v1/chat/completions"


class TestTheModelCheck:
    def check(self, *urls: str, **fields: Any) -> None:
        ask(client(*urls, **fields), lambda made: made.require_model("teacher"))

    def test_passes_where_the_model_is_listed_though_another_endpoint_is_down(self) -> None:
        with serving(in_turn(FINE), models=["other", "teacher"]) as (_, url):
            self.check(GONE, url)

    def test_names_the_models_that_are_listed(self) -> None:
        with serving(in_turn(FINE), models=["a", "b"]) as (_, url), pytest.raises(UserError, match="it lists a, b") as raised:
            self.check(url)
        assert "'teacher' of orchestrator.teacher_rollout_model.model.name" in raised.value.got

    def test_says_that_no_endpoint_answers(self) -> None:
        with pytest.raises(UserError, match=r"no endpoint of .* answers") as raised:
            self.check(GONE)
        assert raised.value.exit == Exit.UNREACHABLE

    def test_is_left_out_on_request(self) -> None:
        self.check(GONE, skip_model_check=True)
