"""Requests to endpoints that fail, are slow, ask for patience, leave and come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.http import (
    Endpoint,
    EndpointFault,
    EndpointPool,
    EndpointReply,
    RequestRefused,
    decoded,
    endpoint_pool,
    require_model,
)
from onstream.settings.sections.client import ClientSettings
from tests.faulty_server import Answer, Body, serving

SECTION = "orchestrator.teacher_rollout_model"
FINE = Answer(body={"ok": True, "usage": {"total_tokens": 7}})
EARLY_S = 0.02
"""A timer may be early by this."""
GONE = "http://127.0.0.1:9/v1"  # the discard port: nothing listens
Use = Callable[[EndpointPool[Endpoint]], Any]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_WAIT_S", 0.001)


def client(*urls: str, **fields: Any) -> ClientSettings:
    return ClientSettings.model_validate(
        {"base_url": list(urls), "timeout": 5.0, "breaker_pause": 0.1, **fields}
    )


async def no_probe(endpoint: Endpoint) -> None:
    pass


def ask(
    settings: ClientSettings,
    use: Use,
    check: Callable[[Endpoint], Any] = no_probe,
    *,
    conclusive: bool = False,
) -> Any:
    """What `use`, a coroutine function, returns with a pool of the endpoints of `settings`."""

    async def run() -> Any:
        made = EndpointPool(
            settings, Endpoint, model="teacher", section=SECTION, check=check, conclusive=conclusive
        )
        try:
            return await use(made)
        finally:
            await made.close()

    return asyncio.run(run())


async def question(endpoint: Endpoint) -> Any:
    return decoded(await endpoint.post("/v1/chat/completions", {"question": 1}))


async def post(made: EndpointPool[Endpoint]) -> Any:
    """The answer of as many attempts as the settings allow."""
    return (await made.attempts(question)).answer


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - what a worker reads off the pool has no event
        await asyncio.sleep(0.01)


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
        with pytest.raises(EndpointFault, match=r"^500 boom$"):
            ask(client(url, max_retries=2), post)
        assert len(server.bodies) == 3


def test_a_request_that_is_refused_is_not_asked_again_and_has_the_servers_words() -> None:
    with serving(
        in_turn(Answer(400, {"error": {"message": "prompt of 9 tokens,\nmaximum 8"}}))
    ) as (server, url):
        with pytest.raises(
            RequestRefused, match=rf"^{url} refused it: 400 prompt of 9 tokens, maximum 8$"
        ):
            ask(client(url), post)
        assert len(server.bodies) == 1


def test_a_slow_drip_ends_at_the_timeout() -> None:
    with serving(in_turn(Answer(200, {"x": "y" * 1000}, drip_s=0.02), FINE)) as (_, url):
        started = time.monotonic()
        assert ask(client(url, timeout=0.3), post) == FINE.body
        assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("wait", ["0.4", None], ids=["seconds", "date"])
def test_retry_after_is_kept(wait: str | None) -> None:
    due = int(time.time()) + 2  # a date has whole seconds
    value = wait or formatdate(due, usegmt=True)
    with serving(in_turn(Answer(429, {}, {"Retry-After": value}), FINE)) as (server, url):
        assert ask(client(url), post) == FINE.body
        first, second = (asked.at for asked in server.asked)
        if wait:
            assert second - first >= float(wait)
        else:
            assert time.time() - time.monotonic() + second >= due - EARLY_S


def test_requests_go_to_the_endpoint_with_the_fewest_in_flight() -> None:
    release = threading.Event()
    arrived = threading.Event()

    def slow(body: Body) -> Answer:
        arrived.set()
        release.wait(5)
        return FINE

    def last(body: Body) -> Answer:
        if len(quick.bodies) == 8:
            release.set()
        return FINE

    with serving(slow) as (held, first_url), serving(last) as (quick, second_url):

        async def use(made: EndpointPool[Endpoint]) -> int:
            first = [asyncio.create_task(post(made)) for _ in range(2)]
            await asyncio.to_thread(arrived.wait, 5)
            _, waiting = await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            for _ in range(7):
                await post(made)  # one is in flight at the slow one, none at the other
            await waiting.pop()
            return made.in_flight

        assert ask(client(first_url, second_url), use) == 0
        assert (len(held.bodies), len(quick.bodies)) == (1, 8)


def test_one_endpoint_is_given_no_more_than_max_in_flight() -> None:
    def slowly(body: Body) -> Answer:
        time.sleep(0.02)
        return FINE

    async def use(made: EndpointPool[Endpoint]) -> None:
        await asyncio.gather(*(post(made) for _ in range(12)))

    with serving(slowly) as (server, url):
        server.hold_until_together(3)
        ask(client(url, max_in_flight=3), use)
        assert server.most_in_flight == 3


def test_the_breaker_leaves_a_failing_endpoint_alone_and_lets_one_request_try_it() -> None:
    broken = Answer(500, {"error": "boom"})
    with serving(in_turn(broken, broken, broken, FINE)) as (server, url):

        async def use(made: EndpointPool[Endpoint]) -> list[str]:
            problems = []
            for _ in range(3):
                with pytest.raises(EndpointFault):
                    await post(made)
                problems.append(made.problem)
            await asyncio.gather(*(post(made) for _ in range(4)))
            return [*problems, made.problem]

        problems = ask(client(url, max_retries=0, breaker_failures=2, breaker_pause=0.3), use)
        assert problems == ["", *[f"waiting for the teacher: {url}: 500 boom"] * 2, ""]
        times = [asked.at for asked in server.asked]
        assert times[2] - times[1] >= 0.3, "the pause before the trial"
        assert times[3] - times[2] >= 0.3, "a trial that fails opens it again"
        assert len(times) == 7


def test_after_the_trial_all_that_waited_go_on_together() -> None:
    def slowly(body: Body) -> Answer:
        if len(server.bodies) == 1:
            return Answer(500, {"error": "boom"})
        if len(server.bodies) == 2:  # the trial, which is alone
            server.hold_until_together(4)
        return FINE

    async def use(made: EndpointPool[Endpoint]) -> None:
        with pytest.raises(EndpointFault):
            await post(made)
        await asyncio.gather(*(post(made) for _ in range(9)))

    with serving(slowly) as (server, url):
        ask(client(url, breaker_failures=1, max_retries=0, max_in_flight=4), use)
        assert server.most_in_flight == 4


def test_an_endpoint_that_is_gone_does_not_hold_up_the_others() -> None:
    async def use(made: EndpointPool[Endpoint]) -> Any:
        answers: list[EndpointReply[Any]] = await asyncio.gather(
            *(made.attempts(question) for _ in range(10))
        )
        return {answered.endpoint for answered in answers}, made.serving, made.problem

    with serving(in_turn(FINE)) as (server, url):
        answered, serving_now, problem = ask(
            client(GONE, url, breaker_failures=1, breaker_pause=60), use
        )
        assert (answered, serving_now) == ({url}, 1)
        assert problem.startswith(f"1 of 2 endpoints are down: {GONE}: ConnectError")
        assert len(server.bodies) == 10


def test_a_last_request_that_gets_nonsense_is_given_up_once_and_the_next_is_waited_for() -> None:
    nonsense = Answer(200, b"<html>")

    async def use(made: EndpointPool[Endpoint]) -> None:
        await made.ask(question)
        with pytest.raises(RequestRefused, match="failed 3 times with no other request"):
            await made.ask(question)
        requests = made.requests
        with pytest.raises(RequestRefused, match="400"):
            await made.ask(question)
        assert made.requests - requests > endpoint_pool.ROUNDS

    answers = [FINE, *[nonsense] * (endpoint_pool.ROUNDS + 5), Answer(400, {"error": "no"})]
    with serving(in_turn(*answers)) as (_, url):
        ask(client(url, max_retries=0, breaker_failures=100, breaker_pause=0.1), use)


def test_requests_per_second_is_kept() -> None:
    async def use(made: EndpointPool[Endpoint]) -> None:
        await asyncio.gather(*(post(made) for _ in range(6)))

    with serving(in_turn(FINE)) as (server, url):
        started = time.monotonic()
        ask(client(url, requests_per_second=20), use)
        assert max(asked.at for asked in server.asked) - started >= 5 / 20 - EARLY_S


def test_the_key_and_the_headers_are_sent() -> None:
    with serving(in_turn(FINE)) as (server, url):
        ask(client(url, api_key="secret", headers={"X-Team": "blue"}), post)
        assert server.asked[0].headers["Authorization"] == "Bearer secret"
        assert server.asked[0].headers["X-Team"] == "blue"
        assert server.asked[0].path == "/v1/chat/completions"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_status_about_the_endpoint_is_waited_out_and_told(code: int) -> None:
    closed = Answer(code, {"error": {"message": "not for you"}})
    with serving(lambda body: closed) as (server, url):

        async def use(made: EndpointPool[Endpoint]) -> list[Any]:
            asked = asyncio.create_task(made.ask(question))
            await until(lambda: made.problem)
            told = made.problem
            pending = not asked.done()
            server.answer = lambda body: FINE
            return [told, pending, (await asked).answer, made.problem]

        settings = client(url, max_retries=1, breaker_failures=2)
        assert ask(settings, use) == [
            f"waiting for the teacher: {url}: {code} not for you",
            True,
            FINE.body,
            "",
        ]


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_status_about_one_question_refuses_that_one_alone(code: int) -> None:
    refusal = Answer(code, {"error": {"message": "too long"}})

    async def use(made: EndpointPool[Endpoint]) -> Any:
        with pytest.raises(RequestRefused, match=rf"refused it: {code} too long$"):
            await made.ask(question)
        return (await made.ask(question)).answer, made.problem

    with serving(in_turn(refusal, FINE)) as (_, url):
        assert ask(client(url, breaker_failures=1), use) == (FINE.body, "")


def test_a_server_that_is_busy_for_long_is_told_of_without_being_left_alone() -> None:
    with serving(lambda body: Answer(429, {"error": {"message": "slow down"}})) as (server, url):

        async def use(made: EndpointPool[Endpoint]) -> Any:
            asked = asyncio.create_task(made.ask(question))
            await until(lambda: made.problem)
            told = made.problem
            serving_now = made.serving
            server.answer = lambda body: FINE
            await asked
            return told, serving_now, made.problem

        told = ask(client(url, max_retries=1, breaker_failures=1), use)
        assert told == (f"waiting for the teacher: {url}: 429 slow down", 1, "")


def test_a_refused_trial_shows_that_the_endpoint_is_back() -> None:
    refusal = Answer(400, {"error": {"message": "too long"}})

    async def use(made: EndpointPool[Endpoint]) -> Any:
        with pytest.raises(EndpointFault):
            await post(made)
        with pytest.raises(RequestRefused):
            await post(made)
        return made.problem, made.capacity

    with serving(in_turn(Answer(500), refusal)) as (_, url):
        assert ask(client(url, breaker_failures=1, max_retries=0, max_in_flight=4), use) == ("", 4)


def test_a_probe_that_proves_lets_all_in_at_once_and_one_that_fails_nobody() -> None:
    checked: list[str] = []

    async def check(endpoint: Endpoint) -> None:
        checked.append(endpoint.down)
        if len(checked) == 1:
            raise UserError("other weights", expected="the same", next_step="Serve them.")

    async def use(made: EndpointPool[Endpoint]) -> Any:
        with pytest.raises(EndpointFault):
            await post(made)
        asked = asyncio.create_task(post(made))
        await until(lambda: made.capacity)
        return made.capacity, await asked

    with serving(in_turn(Answer(500, {"error": "boom"}), FINE)) as (server, url):
        settings = client(url, breaker_failures=1, max_retries=0, max_in_flight=4)
        assert ask(settings, use, check, conclusive=True) == (4, FINE.body)
        assert checked == ["500 boom", "other weights; expected the same. Serve them."]
        assert len(server.bodies) == 2


class TestTheModelCheck:
    def check(self, *urls: str, patient: bool = False, **fields: Any) -> None:
        async def check(endpoint: Endpoint) -> None:
            await require_model(endpoint, "teacher", SECTION)

        ask(client(*urls, **fields), lambda made: made.open(patient=patient), check)

    def test_passes_where_the_model_is_listed_though_another_endpoint_is_down(self) -> None:
        with serving(in_turn(FINE), models=["other", "teacher"]) as (_, url):
            self.check(GONE, url)

    def test_names_the_models_that_are_listed(self) -> None:
        with (
            serving(in_turn(FINE), models=["a", "b"]) as (_, url),
            pytest.raises(UserError, match="models it lists: 'a', 'b'") as raised,
        ):
            self.check(url)
        assert raised.value.got == f"{SECTION}.model.name = 'teacher', which {url} does not serve"
        assert f"{SECTION}.client.skip_model_check" in raised.value.next_step

    def test_says_that_no_endpoint_answers(self) -> None:
        with pytest.raises(UserError, match=r"no endpoint of .* answers") as raised:
            self.check(GONE)
        assert raised.value.exit == Exit.UNREACHABLE

    def test_waits_for_endpoints_that_do_not_answer_where_it_is_told_to(self) -> None:
        self.check(GONE, patient=True)

    def test_names_the_key_where_the_endpoint_wants_another(self) -> None:
        with serving(in_turn(FINE)) as (server, url):
            server.key = "right"
            with pytest.raises(
                UserError, match=r"refuses this worker \(401 Unauthorized\)"
            ) as raised:
                self.check(url, api_key="wrong", patient=True)
        assert (
            "ONSTREAM_ORCHESTRATOR__TEACHER_ROLLOUT_MODEL__CLIENT__API_KEY"
            in raised.value.next_step
        )
