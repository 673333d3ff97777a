"""The engine `server` against hand-written servers with faults that no vLLM gives on demand. What
works is tested in tests/vllm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.models.tokenizer import load_configs, load_tokenizer
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.server.engine import ServerEngine
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.faulty_server import Answer, Asked, FaultyServer

GENERATE = "/inference/v1/generate"
GONE = Answer(404, {"detail": "Not Found"})
BROKEN = Answer(500, {"error": "out of order"})


class HandWrittenVllm(FaultyServer):
    """Speaks vLLM's routes without a model: every token is 7, with `logprob`. `instead` answers
    some paths in their stead.

    `label` is what it calls its weights, `calls` the paths that replaced them; `holding`, unless it
    is set, keeps generation waiting.
    """

    def __init__(self, name: str) -> None:
        super().__init__(lambda body: Answer(), models=(name,))
        self.label = "default"
        self.logprob = 0.0
        self.calls = list[str]()
        self.instead: dict[str, Answer] = {}
        self.holding = threading.Event()
        self.holding.set()
        self.tokenizer = character_tokenizer()

    def reply(self, asked: Asked) -> Answer:
        path = asked.path.partition("?")[0]
        if "/weight" not in path and path != GENERATE and asked.body is not None:
            self.calls.append(asked.path)
        return self.instead.get(path) or self.instead.get(asked.path) or super().reply(asked)

    def listing(self, path: str) -> Answer:
        known = {"/weight_info": {"weight_version": self.label}, "/is_paused": {"is_paused": False}}
        return Answer(body=known[path]) if path in known else super().listing(path)

    def posted(self, asked: Asked) -> Answer:
        body = asked.body or {}
        if asked.path == "/tokenize":
            return Answer(
                body={
                    "tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                }
            )
        if asked.path == "/collective_rpc":
            return Answer(body={"results": ["ready"]})
        if asked.path == "/finish_weight_update":
            self.label = body.get("weight_version", self.label)
        return (
            self.written(body["sampling_params"]["max_tokens"])
            if asked.path == GENERATE
            else Answer()
        )

    def written(self, count: int) -> Answer:
        label = self.label
        self.holding.wait()
        span = {"version": label, "start": 0, "end": count}
        logprobs = {"content": [{"token_id": 7, "logprob": self.logprob}] * count}
        choice = {
            "index": 0,
            "token_ids": [7] * count,
            "finish_reason": "length",
            "logprobs": logprobs,
            "weight_versions": [span],
        }
        return Answer(body={"choices": [choice]})

    @property
    def asked_for(self) -> int:
        """Completions that it was asked for, those of the start apart."""
        return sum(body.get("cache_salt") is not None for body in self.bodies)


@pytest.fixture
def servers(student_dir: Path) -> Iterator[Callable[[], HandWrittenVllm]]:
    with ExitStack() as stack:

        def start() -> HandWrittenVllm:
            server = HandWrittenVllm(str(student_dir))
            server.start()
            stack.callback(server.stop)
            stack.callback(server.holding.set)
            return server

        yield start


@pytest.fixture
def make(student_dir: Path, tmp_path: Path) -> Iterator[Callable[..., ServerEngine]]:
    made: list[ServerEngine] = []

    def build(*servers: HandWrittenVllm, **client: Any) -> ServerEngine:
        given = {
            "base_url": [server.base_url for server in servers],
            "breaker_pause": 0.05,
            **client,
        }
        inference = {"engine": "server", "client": given, "sampling": {"max_completion": 12}}
        settings = Settings.model_validate(
            {
                "model": {"name": str(student_dir)},
                "run": {"dir": str(tmp_path)},
                "inference": inference,
            }
        )
        made.append(
            ServerEngine(settings, load_tokenizer(student_dir), (), load_configs(student_dir)[0])
        )
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def version(number: int) -> LoadedPolicy:
    return LoadedPolicy.of(number, {"weight": torch.full((4,), float(number))})


def asked(count: int, first: int = 0) -> list[GenerationRequest]:
    prompt = character_tokenizer()("abc", return_tensors="np")["input_ids"][0].astype("int32")
    return [
        GenerationRequest(key, prompt, max_tokens=2, seed=key)
        for key in range(first, first + count)
    ]


def until(engine: ServerEngine, count: int) -> list[Completion]:
    finished: list[Completion] = []
    while len(finished) < count:
        finished += engine.step()
    return finished


def versions(completions: list[Completion]) -> set[int]:
    return {span.version for one in completions for span in one.version_spans}


def test_of_two_servers_the_one_that_could_not_load_a_version_gets_no_request_until_it_has_it(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    well = servers()
    ill = servers()
    engine = make(well, ill)
    engine.load(version(1))
    ill.instead["/collective_rpc"] = Answer(body={"results": ["no such file"]})
    before = ill.asked_for
    engine.load(version(2))
    while engine.version < 2:
        engine.step()
    assert engine.problem.startswith(
        f"1 of 2 endpoints are down: {ill.base_url}: cannot load policy version 2: no such file"
    )
    assert engine.slots == 256 and "pause" not in " ".join(ill.calls[-2:]), "nothing was touched"
    engine.add(asked(8))
    assert versions(until(engine, 8)) == {2}
    assert (well.asked_for, ill.asked_for) == (8, before)
    ill.instead.clear()
    while engine.problem:
        engine.step()
    engine.add(asked(8, first=8))
    assert versions(until(engine, 8)) == {2} and ill.asked_for > before


def test_a_server_that_fails_while_it_loads_stays_paused_and_others_write_on(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    well = servers()
    torn = servers()
    engine = make(well, torn)
    engine.load(version(1))
    torn.instead["/update_weights"] = BROKEN
    torn.calls.clear()
    engine.load(version(2))
    while engine.version < 2:
        engine.step()
    assert "cannot load policy version 2: 500 out of order" in engine.problem
    failed = torn.calls.index("/update_weights")
    assert torn.calls[failed + 1] == "/pause?mode=abort", "and not /resume"
    engine.add(asked(4))
    assert versions(until(engine, 4)) == {2} and torn.asked_for == 0
    del torn.instead["/update_weights"]
    while engine.problem:
        engine.step()
    assert torn.label.startswith("2.") and torn.calls[-1] == "/resume"


def test_an_update_that_somebody_left_open_is_closed_first(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    engine = make(server)
    once = [BROKEN]

    class Once(dict[str, Answer]):
        def get(self, path: str, default: Any = None) -> Any:
            return once.pop() if path == "/start_weight_update" and once else default

    server.instead = Once()
    engine.load(version(1))
    order = [path for path in server.calls if "update" in path]
    assert order == [
        "/start_weight_update",
        "/finish_weight_update",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    ]
    assert engine.problem == "" and server.label.startswith("1.")


def test_what_a_server_wrote_with_unknown_weights_is_thrown_away_and_asked_for_again(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    engine = make(server)
    engine.load(version(3))
    server.label = "default"  # it was started again, between two requests
    engine.add(asked(3))
    assert versions(until(engine, 3)) == {3}
    assert server.asked_for > 3 and server.label.startswith("3.")


def test_tokens_with_a_logprob_above_0_are_thrown_away_and_asked_for_again(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    engine = make(server)
    engine.load(version(1))
    server.logprob = 0.25
    engine.add(asked(1))
    while not engine.problem:
        assert not engine.step()
    assert "a token with the logprob 0.25; expected at most 0, in nats" in engine.problem
    server.logprob = 0.0
    [written] = until(engine, 1)
    assert written.logprobs.tolist() == [0.0, 0.0]


def test_a_server_that_another_generator_has_taken_stops_this_one(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    engine = make(server)
    engine.load(version(1))
    server.label = "1.0123456789ab.deadbeef"
    engine.add(asked(1))
    with pytest.raises(UserError, match="another generator has put its weights on") as stopped:
        until(engine, 1)
    assert stopped.value.exit == Exit.REFUSED


def test_an_update_of_its_own_that_is_applied_late_is_replaced_and_stops_nobody(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    engine = make(server)
    engine.load(version(1))
    given_up = server.label
    engine.load(version(2))
    while engine.version < 2:
        engine.step()
    server.label = given_up  # found by the next request
    engine.add(asked(3))
    assert versions(until(engine, 3)) == {2} and server.label.startswith("2.")
    server.label = given_up  # found by the next update
    engine.load(version(3))
    while engine.version < 3:
        engine.step()
    engine.add(asked(3))
    assert versions(until(engine, 3)) == {3} and server.label.startswith("3.")


def test_a_request_that_a_server_refuses_ends_the_engine_with_its_words(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    engine = make(server)
    engine.load(version(1))
    server.instead[GENERATE] = Answer(400, {"error": {"message": "too long by far"}})
    engine.add(asked(1))
    with pytest.raises(UserError, match=r"refuses a request: .* 400 too long by far"):
        until(engine, 1)


def test_slots_and_context_are_those_of_the_servers_that_are_there(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    first = servers()
    second = servers()
    second.instead["/v1/models"] = Answer(
        body={"data": [{"id": second.models[0], "max_model_len": 40}]}
    )
    engine = make(first, second, max_in_flight=5)
    assert (engine.slots, engine.max_context) == (10, 40)
    engine.load(version(1))
    second.stop()
    engine.load(version(2))
    while engine.version < 2:
        engine.step()
    assert engine.slots == 5 and "1 of 2 endpoints are down" in engine.problem
    second.start()


def test_requests_are_spread_over_the_servers_and_each_gets_no_more_than_it_takes(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    both = [servers(), servers()]
    engine = make(*both, max_in_flight=6)
    engine.load(version(1))
    for server in both:
        server.holding.clear()
    engine.add(asked(40))
    while any(server.in_flight < 6 for server in both):
        engine.step()
    assert engine.active == 40
    for server in both:
        server.holding.set()
    assert len(until(engine, 40)) == 40 and engine.active == 0
    assert [server.most_in_flight for server in both] == [6, 6]


UNFIT = {
    "no scale-out": (
        {GENERATE: Answer(403, {"error": "forbidden"})},
        "expected the flag --enable-scale-out",
    ),
    "no dev mode": (
        {"/is_paused": GONE},
        "expected the environment variable VLLM_SERVER_DEV_MODE=1",
    ),
    "no extension": (
        {"/collective_rpc": BROKEN},
        "--worker-extension-cls onstream.workers.generator.engines.vllm.extension.Extension",
    ),
    "another tokenizer": (
        {"/tokenize": Answer(body={"tokens": [1, 2]})},
        "as the student's tokenizer does",
    ),
    "another model": (
        {"/v1/models": Answer(body={"data": [{"id": "other"}]})},
        "expected one of the models it lists: 'other'",
    ),
}


@pytest.mark.parametrize(("instead", "words"), UNFIT.values(), ids=UNFIT)
def test_a_server_that_cannot_be_used_is_refused_with_what_it_lacks(
    instead: dict[str, Answer],
    words: str,
    servers: Callable[[], HandWrittenVllm],
    make: Callable[..., ServerEngine],
) -> None:
    server = servers()
    server.instead.update(instead)
    with pytest.raises(UserError) as refused:
        make(server)
    assert words in str(refused.value) and server.base_url in str(refused.value)


def test_a_context_without_room_for_a_prompt_is_refused(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    server.instead["/v1/models"] = Answer(
        body={"data": [{"id": server.models[0], "max_model_len": 12}]}
    )
    with pytest.raises(
        UserError, match=r"is 12 tokens, with inference\.sampling\.max_completion = 12"
    ):
        make(server)


def test_logprobs_from_before_the_filters_are_refused(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    right = server.written(1).body["choices"][0]
    server.instead[GENERATE] = Answer(
        body={"choices": [right | {"logprobs": {"content": [{"token_id": 7, "logprob": -1.5}]}}]}
    )
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        make(server)


def test_an_address_where_nothing_answers_and_no_address_are_refused(
    servers: Callable[[], HandWrittenVllm], make: Callable[..., ServerEngine]
) -> None:
    server = servers()
    server.stop()
    with pytest.raises(UserError, match=r"no endpoint of the student .* answers") as refused:
        make(server)
    assert refused.value.exit == Exit.UNREACHABLE
    server.start()
    with pytest.raises(UserError, match=r"without inference\.client\.base_url"):
        make()
