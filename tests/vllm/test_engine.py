"""The engine over vLLM, on a real one: what is sampled and what is said of it, alone, in company,
and through updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from onstream.pipeline.errors import UserError
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.student import Student, open_student
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from tests.vllm.conftest import on_vllm
from tests.vllm.reference import CLOSE_NATS, gaps, model_of, policy_of

pytestmark = [pytest.mark.slow, pytest.mark.rotates("vLLM in the generator, and in a server", 0, 2)]
MODES = ("recompute", "keep", "wait", "abort")
NUMBERS = count(1)
"""Version numbers that no other test of the session has used."""


@pytest.fixture(scope="module")
def first(student_dir: Path) -> Any:
    """The weights that the engine started with."""
    return model_of(student_dir)


@pytest.fixture(scope="module")
def second(teacher_dir: Path) -> Any:
    """Others of the same shape, whose distributions have little in common with the first's."""
    return model_of(teacher_dir)


@pytest.fixture
def engine(student: Student, first: Any) -> Iterator[Any]:
    """The session's engine with nothing in hand, under the first weights; `recompute`."""
    engine: Any = student.engine
    engine.on_new_weights = "recompute"
    engine.load(policy_of(next(NUMBERS), first))
    yield engine
    finish(engine)


def finish(engine: Any) -> dict[int, Completion]:
    """All that is in hand, by key."""
    written = []
    while engine.active:
        written += engine.step()
    return {one.key: one for one in written}


def a_prompt(seed: int, length: int) -> Any:
    return np.random.default_rng(seed).integers(8, 128, length).astype(np.int32)


def some_requests(
    keys: range, *, prompt_tokens: Sequence[int] = (30, 150), longest: int = 120, **sampling: Any
) -> list[GenerationRequest]:
    """Groups of four with one prompt, every second of them longer than a block of vLLM's cache, to
    be finished one after the other.
    """
    prompts = {
        group: a_prompt(group, prompt_tokens[group % len(prompt_tokens)])
        for group in {key // 4 for key in keys}
    }
    lengths = {key: 4 + (key - keys.start) * (longest - 4) // len(keys) for key in keys}
    return [
        GenerationRequest(key, prompts[key // 4], lengths[key], seed=1000 + key, **sampling)
        for key in keys
    ]


def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    engine: Any, first: Any
) -> None:
    for sampling in ({}, {"temperature": 0.7}, {"temperature": 0.0}):
        requests = some_requests(range(24), longest=60, **sampling)
        engine.add(requests)
        written = finish(engine)
        worst = max(
            gaps({engine.version: first}, request, written[request.key]).max()
            for request in requests
        )
        print(
            f"{sampling or 'temperature 1'}: vLLM and transformers differ by at most {worst:.1e} "
            "nats"
        )
        assert worst < CLOSE_NATS


@torch.no_grad()
def test_tokens_are_drawn_by_their_probabilities(engine: Any, first: Any) -> None:
    prompt = a_prompt(7, 20)
    draws = 3000
    engine.add([GenerationRequest(key, prompt, 1, seed=key) for key in range(draws)])
    drawn = (
        np.bincount([one.token_ids[0] for one in finish(engine).values()], minlength=128) / draws
    )
    wanted = (
        first(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1].softmax(-1).numpy()
    )
    likely = wanted > 0.002
    deviations = (drawn - wanted)[likely] / np.sqrt(wanted * (1 - wanted) / draws)[likely]
    assert np.abs(deviations).max() < 4.5, "standard deviations of the likelier tokens' shares"


def test_a_seed_decides_the_draws_in_whatever_company(engine: Any) -> None:
    requests = some_requests(range(48), longest=50)
    engine.add([requests[40]])
    alone = finish(engine)[40]
    engine.add(requests)
    crowd = finish(engine)
    assert alone.token_ids.tolist() == crowd[40].token_ids.tolist()
    assert np.abs(alone.logprobs - crowd[40].logprobs).max() < CLOSE_NATS
    engine.add([replace(requests[40], seed=5)])
    assert alone.token_ids.tolist() != finish(engine)[40].token_ids.tolist()


def test_a_completion_ends_with_its_stop_token_or_its_length(engine: Any) -> None:
    requests = some_requests(range(48), longest=200)
    engine.add(requests)
    written = finish(engine)
    lengths = {request.key: request.max_tokens for request in requests}
    assert engine._stop_ids == {3}
    reasons = {one.finish_reason for one in written.values()}
    assert reasons == {"stop", "length"}
    for key, one in written.items():
        stops = [at for at, token in enumerate(one.token_ids.tolist()) if token == 3]
        assert stops == ([len(one.token_ids) - 1] if one.finish_reason == "stop" else [])
        assert one.finish_reason == "stop" or len(one.token_ids) == lengths[key]


def test_what_cannot_be_written_is_refused(engine: Any) -> None:
    assert engine.max_context == 512 and engine.slots == 64
    for request in (
        GenerationRequest(0, a_prompt(0, 500), 13, 0),
        GenerationRequest(0, a_prompt(0, 0), 5, 0),
        GenerationRequest(0, a_prompt(0, 3), 0, 0),
    ):
        with pytest.raises(ValueError, match="request 0"):
            engine.add([request])
    assert engine.active == 0
    engine.add([GenerationRequest(0, a_prompt(0, 500), 12, 0)])
    assert len(finish(engine)[0].token_ids) <= 12


def through_updates(
    engine: Any, models: Sequence[Any]
) -> tuple[dict[int, Any], list[GenerationRequest], dict[int, Completion]]:
    """Requests in three waves, half again as many as there are slots, each wave met by an update in
    its middle.

    Returns the models by version, the requests and what was written.
    """
    versions = {engine.version: models[0]}
    requests = list[GenerationRequest]()
    written = list[Completion]()
    lengths = (30, 150) if engine.on_new_weights != "keep" else (30, 60)
    for wave, model in enumerate([*models[1:], None]):
        requests += some_requests(range(wave * 96, wave * 96 + 96), prompt_tokens=lengths)
        engine.add(requests[wave * 96 :])
        while len(written) < wave * 96 + 8:
            written += engine.step()
        if model is not None:
            number = next(NUMBERS)
            versions[number] = model
            engine.load(policy_of(number, model))
    while engine.active:
        written += engine.step()
    return versions, requests, {one.key: one for one in written}


@pytest.mark.parametrize("mode", MODES)
def test_every_token_is_of_the_version_that_its_span_names_through_updates_under_load(
    engine: Any, first: Any, second: Any, mode: str
) -> None:
    engine.on_new_weights = mode
    versions, requests, written = through_updates(engine, [first, second, first])
    assert engine.version == max(versions) and len(written) == len(requests)
    assert {span.version for one in written.values() for span in one.version_spans} == set(versions)
    spans = [len(one.version_spans) for one in written.values()]
    worst = max(
        gaps(versions, request, written[request.key], stale=mode == "keep").max()
        for request in requests
    )
    print(
        f"{mode}: at most {worst:.1e} nats; {sum(number > 1 for number in spans)} of {len(spans)} "
        "completions in several spans"
    )
    assert worst < CLOSE_NATS
    assert max(spans) == 1 if mode == "wait" else max(spans) > 1


def test_kept_keys_and_values_make_tokens_that_no_version_alone_would_have_drawn_so(
    engine: Any, first: Any, second: Any
) -> None:
    """After an update the logprobs are those that were sampled from (the test above), and not those
    of the version in the span.
    """
    engine.on_new_weights = "keep"
    versions, requests, written = through_updates(engine, [first, second])
    found = [
        (written[request.key].version_spans, gaps(versions, request, written[request.key]))
        for request in requests
    ]
    assert max(gap[: spans[0].end].max() for spans, gap in found) < CLOSE_NATS
    after = np.concatenate([gap[spans[0].end :] for spans, gap in found])
    print(
        f"after the update: {after.mean():.2f} nats from the new version in the mean, at most "
        f"{after.max():.2f}"
    )
    assert after.size and np.median(after) > 0.1


def test_a_request_that_was_aborted_by_an_update_does_not_draw_the_same_again(
    engine: Any, first: Any
) -> None:
    engine.on_new_weights = "abort"
    _, _, written = through_updates(engine, [first, first])
    halves = [
        np.split(one.token_ids, [one.version_spans[0].end])
        for one in written.values()
        if len(one.version_spans) > 1
    ]
    assert halves
    for before, after in halves:
        shared = min(len(before), len(after))
        assert shared < 12 or before[:shared].tolist() != after[:shared].tolist()


def test_weights_that_cannot_be_used_change_nothing_and_are_told(
    engine: Any, first: Any, second: Any, tmp_path: Path
) -> None:
    version = engine.version
    requests = some_requests(range(32))
    engine.add(requests)
    torn = policy_of(next(NUMBERS), second)
    torn.file().write_bytes(torn.file().read_bytes()[:-8] + bytes(8))
    with pytest.raises(
        WeightsError, match=r"have the digest \w{12}; \S+ was announced with \w{12}"
    ):
        engine.load(torn)
    gone = policy_of(next(NUMBERS), second)
    gone.file().unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        engine.load(gone)
    narrow = model_of(
        write_fresh(tmp_path, ModelShape(hidden=32, layers=2, intermediate=64), seed=1)
    )
    with pytest.raises(
        WeightsError, match=r"of another shape .*embed_tokens.weight \[128, 32\], not \[128, 64\]"
    ):
        engine.load(policy_of(next(NUMBERS), narrow))
    headless = {
        name: tensor for name, tensor in second.state_dict().items() if "layers.1." not in name
    }
    with pytest.raises(WeightsError, match=r"missing .'model.layers.1"):
        engine.load(LoadedPolicy.of(next(NUMBERS), headless))
    written = finish(engine)
    assert engine.version == version
    assert (
        max(gaps({version: first}, request, written[request.key]).max() for request in requests)
        < CLOSE_NATS
    )
    engine.load(policy_of(next(NUMBERS), second))
    engine.add(requests)
    written = finish(engine)
    assert (
        max(
            gaps({engine.version: second}, request, written[request.key]).max()
            for request in requests
        )
        < CLOSE_NATS
    )


def engines() -> set[psutil.Process]:
    """The processes of vLLM's engines under this one."""
    return {
        child for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name()
    }


def test_an_engine_that_is_closed_with_requests_in_flight_leaves_nothing_behind(
    student_dir: Path,
) -> None:
    before = engines()
    engine = open_student(
        on_vllm(
            student_dir, max_batch=8, max_model_len=256, extra_args={"max_num_batched_tokens": 300}
        )
    ).engine
    started = engines() - before
    assert started and (engine.slots, engine.max_context) == (8, 256)
    engine.add([GenerationRequest(key, a_prompt(key, 50), 200, seed=key) for key in range(64)])
    while not engine.step():
        pass
    engine.close()
    assert not psutil.wait_procs(started, timeout=5)[1]


def test_a_model_or_an_argument_that_vllm_does_not_take_is_told_in_words(
    student_dir: Path, tmp_path: Path
) -> None:
    before = engines()
    with pytest.raises(
        UserError, match=r"vLLM does not take .*unexpected keyword argument 'colour'"
    ):
        open_student(on_vllm(student_dir, extra_args={"colour": "blue"}))
    with pytest.raises(UserError, match=r"vLLM does not take .*max_model_len"):
        open_student(on_vllm(student_dir, max_model_len=4096))
    with pytest.raises(
        UserError, match=r"vLLM did not start with .*vLLM's own lines above say why"
    ):
        open_student(on_vllm(student_dir, extra_args={"num_gpu_blocks_override": 1}))
    odd = write_fresh(
        tmp_path, ModelShape(hidden=48, layers=1, intermediate=64, head_dim=24), seed=1
    )
    with pytest.raises(
        UserError, match=r"vLLM did not start with .*vLLM's own lines above say why"
    ):
        open_student(on_vllm(odd))  # it starts, and dies of its first request
    assert not psutil.wait_procs(engines() - before, timeout=5)[1]
