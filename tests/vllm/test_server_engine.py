"""The engine `server` over a real vLLM server: whatever befalls server and weights, each token is
what its version span says it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.tokenizer import load_configs, load_tokenizer
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.server.engine import ServerEngine
from tests.vllm.reference import CLOSE_NATS, gaps, model_of, policy_of
from tests.vllm.server import VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.rotates("vLLM in the generator, and in a server", 1, 2)]
CONTEXT = 512
ALWAYS_ACTIVE = 24
Models = Mapping[int, Any]


@pytest.fixture(scope="session")
def student_server(
    student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = VllmServer(
        student_dir,
        tmp_path_factory.mktemp("student") / "vllm.log",
        max_model_len=CONTEXT,
        student=["inference.max_batch=64", "inference.sampling.max_completion=400"],
    )
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def make(
    student_server: VllmServer, student_dir: Path, tmp_path: Path
) -> Iterator[Callable[..., ServerEngine]]:
    """Engines on the server, with these settings of `[inference]` and its client."""
    made: list[ServerEngine] = []

    def build(on_new_weights: str = "recompute", **client: object) -> ServerEngine:
        given = {"base_url": student_server.base_url, "breaker_pause": 0.2, **client}
        inference = {
            "engine": "server",
            "on_new_weights": on_new_weights,
            "client": given,
            "sampling": {"max_completion": 400},
        }
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


@pytest.fixture(scope="session")
def models(student_dir: Path, teacher_dir: Path) -> Models:
    """Version 1 is A, 2 is B, and 3 is A again."""
    a = model_of(student_dir)
    b = model_of(teacher_dir)
    return {1: a, 2: b, 3: a}


def some_requests(count: int, first: int = 0, temperature: float = 1.0) -> list[GenerationRequest]:
    """Completions of 8 to 300 tokens. Every second prompt begins with more than a block of the
    prefix cache that is all the same.
    """
    random = np.random.default_rng(first)
    shared = np.arange(160, dtype=np.int32) % 120
    made = []
    for key in range(first, first + count):
        own = random.integers(0, 128, 8, dtype=np.int32)
        prompt = np.concatenate([shared, own]) if key % 2 else own
        made.append(
            GenerationRequest(
                key,
                prompt,
                max_tokens=8 + 292 * (key % 12) // 11,
                seed=1000 + key,
                temperature=temperature,
            )
        )
    return made


def until(engine: ServerEngine, count: int) -> list[Completion]:
    """The next completions, at least `count` of them."""
    finished: list[Completion] = []
    while len(finished) < count:
        finished += engine.step()
    return finished


def worst_gap(
    models: Models,
    requests: list[GenerationRequest],
    completions: list[Completion],
    *,
    stale: bool = False,
) -> float:
    """The largest distance, in nats, of a token's logprob from transformers' under the version of
    its span.
    """
    asked = {request.key: request for request in requests}
    assert all(len(one.token_ids) == asked[one.key].max_tokens for one in completions)
    return max(float(gaps(models, asked[one.key], one, stale=stale).max()) for one in completions)


def a_b_a(engine: ServerEngine, models: Models) -> tuple[list[GenerationRequest], list[Completion]]:
    """Requests while the weights go from A to B and back; 12 of them after each update.

    However long an update takes, requests are under way when it comes: those that finish are
    followed by others.
    """
    requests = some_requests(48)
    engine.load(policy_of(1, models[1]))
    engine.add(requests)
    finished = until(engine, 8)
    for version in (2, 3):
        engine.load(policy_of(version, models[version]))
        while engine.version < version:
            finished += engine.step()
            if engine.active < ALWAYS_ACTIVE:
                more = some_requests(12, first=len(requests))
                requests += more
                engine.add(more)
        late = some_requests(12, first=len(requests))
        requests += late
        engine.add(late)
        finished += until(engine, 8)
    return requests, finished + until(engine, len(requests) - len(finished))


@pytest.mark.parametrize("mode", ["recompute", "keep", "wait", "abort"])
def test_weights_go_from_a_to_b_and_back_under_load_and_each_token_is_of_the_version_of_its_span(
    mode: str, make: Callable[..., ServerEngine], models: Models
) -> None:
    requests, finished = a_b_a(make(mode), models)
    assert sorted(one.key for one in finished) == sorted(request.key for request in requests)
    assert {span.version for one in finished for span in one.version_spans} == {1, 2, 3}
    crossed = [one for one in finished if len(one.version_spans) > 1]
    assert bool(crossed) == (mode != "wait")
    fresh = [one for one in finished if one not in crossed]
    exact = worst_gap(models, requests, finished, stale=mode == "keep")
    alone = worst_gap(models, requests, fresh)
    print(
        f"{mode}: {len(crossed)} of {len(finished)} completions are of several versions; at most "
        f"{exact:.1e} nats from transformers"
    )
    assert exact < CLOSE_NATS, "with keep, transformers is given the same stale keys and values"
    assert alone < CLOSE_NATS, "nobody finds another version's keys and values in the prefix cache"
    assert mode != "keep" or worst_gap(models, requests, crossed) > 0.1, (
        "no single version gives what stale keys and values give"
    )


def test_the_logprobs_are_those_of_the_temperature_that_was_sampled_at(
    make: Callable[..., ServerEngine], models: Models
) -> None:
    engine = make()
    requests = some_requests(12, temperature=0.7)
    engine.load(policy_of(1, models[1]))
    engine.add(requests)
    assert worst_gap(models, requests, until(engine, 12)) < CLOSE_NATS


def test_a_file_that_is_torn_is_never_loaded_and_what_runs_goes_on_with_the_version_before(
    make: Callable[..., ServerEngine], models: Models, tmp_path: Path
) -> None:
    engine = make(weights_dir=str(tmp_path / "shared"))
    requests = some_requests(48)
    engine.load(policy_of(1, models[1]))
    engine.add(requests)
    finished = until(engine, 4)
    torn = policy_of(2, models[2])
    torn.data[-1000:] ^= 1
    engine.load(torn)
    while not engine.problem:
        finished += engine.step()
    assert "cannot load policy version 2: " in engine.problem
    assert "the weights have the digest" in engine.problem
    assert engine.slots == 0
    finished += until(engine, 48 - len(finished))
    engine.load(policy_of(3, models[2]))
    while engine.problem:
        engine.step()
    late = some_requests(4, first=100)
    engine.add(late)
    finished += until(engine, 4)
    assert {span.version for one in finished for span in one.version_spans} == {1, 3}
    assert worst_gap({1: models[1], 3: models[2]}, requests + late, finished) < CLOSE_NATS
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_a_server_that_comes_back_with_its_first_weights_gets_the_newest_before_it_writes(
    student_server: VllmServer, make: Callable[..., ServerEngine], models: Models
) -> None:
    engine = make()
    requests = some_requests(48)
    engine.load(policy_of(2, models[2]))
    engine.add(requests)
    finished = until(engine, 8)
    student_server.kill()
    while not engine.problem:
        finished += engine.step()
    assert engine.slots == 0 and "waiting for the student: " in engine.problem
    student_server.start()
    finished += until(engine, 48 - len(finished))
    assert engine.problem == "" and engine.slots == 256
    assert {span.version for one in finished for span in one.version_spans} == {2}
    assert worst_gap(models, requests, finished) < CLOSE_NATS


def test_a_second_generator_takes_the_server_and_the_first_one_stops(
    make: Callable[..., ServerEngine], models: Models
) -> None:
    first = make()
    second = make()
    first.load(policy_of(1, models[1]))
    second.load(policy_of(1, models[1]))
    first.load(policy_of(2, models[2]))
    with pytest.raises(UserError, match="another generator has put its weights on"):
        until(first, 1)
    second.add(some_requests(1))
    assert [span.version for span in until(second, 1)[0].version_spans] == [1]


def test_an_update_of_its_own_that_is_applied_late_is_replaced_and_stops_nobody(
    student_server: VllmServer, make: Callable[..., ServerEngine], models: Models, tmp_path: Path
) -> None:
    engine = make(weights_dir=str(tmp_path / "shared"))
    first = policy_of(1, models[1])
    engine.load(first)
    with httpx.Client(base_url=student_server.base_url.removesuffix("/v1"), timeout=60) as server:
        label = server.get("/weight_info").json()["weight_version"]
        [path] = (tmp_path / "shared").iterdir()
        engine.load(policy_of(2, models[2]))
        while engine.version < 2:
            engine.step()
        apply_update(server, str(path), first.digest, label)
        assert server.get("/weight_info").json()["weight_version"] == label
        requests = some_requests(12)
        engine.add(requests)
        finished = until(engine, 12)
        assert server.get("/weight_info").json()["weight_version"].startswith("2.")
    assert {span.version for one in finished for span in one.version_spans} == {2}
    assert worst_gap(models, requests, finished) < CLOSE_NATS


def apply_update(server: httpx.Client, path: str, digest: str, label: str) -> None:
    """What the engine asks of a server for an update, all of it late."""
    stage = {"method": "onstream_stage", "args": [path, digest]}
    server.post("/collective_rpc", json=stage).raise_for_status()
    staged: list[str] = []
    while staged != ["ready"]:
        reply = server.post("/collective_rpc", json={"method": "onstream_staged", "args": []})
        staged = reply.json()["results"]
    server.post("/pause?mode=keep&clear_cache=true", json={}).raise_for_status()
    server.post("/start_weight_update", json={}).raise_for_status()
    info = {"path": path, "digest": digest}
    server.post("/update_weights", json={"update_info": info}).raise_for_status()
    finish = {"weight_version": label}
    server.post("/finish_weight_update", json=finish).raise_for_status()
    server.post("/resume", json={}).raise_for_status()
