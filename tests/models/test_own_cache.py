"""The built-in generator decodes from a model's own cache what slots cannot hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from onstream.pipeline.records import VersionSpan
from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from tests.models.exactness import plain_logprobs
from tests.models.families import tiny_config, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "gemma3_text": {"sliding_window": 8},
    "gpt_oss": {"sliding_window": 8},
    "lfm2": {},
    "nemotron_h": {},
}
LENGTHS = (2, 11, 30)
ShapesOf = Callable[[PreTrainedModel], list[tuple[int, int]]]
"""Gives a list of the shapes [rows, tokens] of a model's forward passes from then on."""


def requests(tokens: int = 9) -> list[GenerationRequest]:
    """Four for each prompt, with ends of their own."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 90, length).astype(np.int32) for length in LENGTHS]
    return [
        GenerationRequest(key, prompts[key // 4], tokens + key % 4, seed=key) for key in range(12)
    ]


def finish(engine: TransformersEngine) -> list[Completion]:
    written = []
    while engine.active:
        written += engine.step()
    return written


def gap(model: PreTrainedModel, one: Completion, start: int = 0, end: int | None = None) -> float:
    prompt = requests()[one.key].prompt_ids
    difference = plain_logprobs(model, prompt, one.token_ids) - torch.from_numpy(one.logprobs)
    return float(difference[start:end].abs().max())


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """The same model after a large update."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    return other


@pytest.mark.parametrize("family", KINDS)
def test_new_weights_in_the_middle_write_every_later_token(family: str) -> None:
    first = tiny_model(family, **KINDS[family])
    second = changed(first)
    engine = TransformersEngine(copy.deepcopy(first), (), slots=8)
    assert engine.own_cache_because
    engine.add(requests())
    for _ in range(4):
        assert engine.step() == []
    engine.load(LoadedPolicy.of(1, second.state_dict()))
    for one in finish(engine):
        total = len(one.token_ids)
        if one.key < 8:
            assert one.version_spans == [VersionSpan(0, 0, 4), VersionSpan(1, 4, total)]
            assert gap(first, one, end=4) < 1e-4 and gap(second, one, start=4) < 1e-4
        else:
            assert one.version_spans == [VersionSpan(1, 0, total)]
            assert gap(second, one) < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_models_of_full_attention_decode_from_slots_which_is_faster(family: str) -> None:
    assert TransformersEngine(tiny_model(family), (), slots=4).own_cache_because is None


def test_what_the_configuration_names_counts_however_little_a_new_model_shows_of_it() -> None:
    config = tiny_config("lfm2")
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(config).eval()
    engine = TransformersEngine(untrained, (), slots=4)
    assert engine.own_cache_because == "it has layers of conv"


@pytest.mark.parametrize("family", KINDS)
def test_a_request_gives_the_same_completion_in_whatever_company(family: str) -> None:
    model = tiny_model(family, **KINDS[family])
    together = TransformersEngine(copy.deepcopy(model), (), slots=12)
    alone = TransformersEngine(copy.deepcopy(model), (), slots=1)
    for engine in (together, alone):
        engine.add(requests())
    written = [
        {one.key: one.token_ids.tolist() for one in finish(engine)} for engine in (together, alone)
    ]
    assert written[0] == written[1] and len(written[0]) == 12


@pytest.fixture
def shapes_of(monkeypatch: pytest.MonkeyPatch) -> ShapesOf:
    def watched(model: PreTrainedModel) -> list[tuple[int, int]]:
        shapes: list[tuple[int, int]] = []
        forward = model.forward

        def noting(**inputs: Any) -> Any:
            rows, tokens = inputs["input_ids"].shape
            shapes.append((rows, tokens))
            return forward(**inputs)

        monkeypatch.setattr(model, "forward", noting)
        return shapes

    return watched


@pytest.mark.parametrize("family", KINDS)
def test_equal_prompts_go_through_the_model_once_and_all_lengths_are_decoded_together(
    family: str, shapes_of: ShapesOf
) -> None:
    model = tiny_model(family, **KINDS[family])
    engine = TransformersEngine(model, (), slots=12)
    shapes = shapes_of(model)
    engine.add(requests(tokens=3))
    finish(engine)
    assert shapes == [(1, 2), (1, 11), (1, 30), (12, 1), (12, 1), (9, 1), (6, 1), (3, 1)]


def test_where_padding_is_not_exact_only_sequences_of_one_length_are_decoded_together(
    shapes_of: ShapesOf,
) -> None:
    model = tiny_model("bart")
    engine = TransformersEngine(copy.deepcopy(model), (), slots=8)
    shapes = shapes_of(engine._model)
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (5, 6, 9)]
    wanted = [GenerationRequest(key, one, 4, seed=key) for key, one in enumerate(prompts)]
    engine.add(wanted[:1])
    engine.step()
    engine.add(wanted[1:])
    written = finish(engine)
    first_and_second, third = (2, 1), (1, 1)
    assert shapes[:4] == [(1, 5), (1, 1), (1, 6), (1, 9)]
    assert shapes[4:6] == [first_and_second, third]
    for one in written:
        expected = plain_logprobs(model, prompts[one.key], one.token_ids)
        assert (expected - torch.from_numpy(one.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in KINDS), ("gemma3_text", torch.bfloat16)],
)
def test_a_long_request_gets_a_token_at_each_step_while_others_come_and_go_and_weights_change(
    family: str, dtype: torch.dtype
) -> None:
    """Requests join at every length, and leave padding behind that is dropped with them."""
    first = tiny_model(family, **KINDS[family]).to(dtype)
    second = changed(first)
    engine = TransformersEngine(copy.deepcopy(first), (), slots=4)
    random = np.random.default_rng(1)
    prompts = {0: np.arange(3, 8, dtype=np.int32)}
    engine.add([GenerationRequest(0, prompts[0], 20, seed=0)])
    done: dict[int, Completion] = {}
    for step in range(20):
        assert 0 not in done
        prompts[step + 1] = random.integers(3, 90, random.integers(2, 30)).astype(np.int32)
        tokens = int(random.integers(1, 7))
        engine.add([GenerationRequest(step + 1, prompts[step + 1], tokens, seed=step)])
        if step == 10:
            engine.load(LoadedPolicy.of(1, second.state_dict()))
        done |= {one.key: one for one in engine.step()}
    assert done[0].version_spans == [VersionSpan(0, 0, 10), VersionSpan(1, 10, 20)]
    done |= {one.key: one for one in finish(engine)}
    assert len(done) == 21
    exact = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    for key, one in done.items():
        for span in one.version_spans:
            model = (first, second)[span.version]
            expected = plain_logprobs(model, prompts[key], one.token_ids)
            off = expected - torch.from_numpy(one.logprobs)
            assert off[span.start : span.end].abs().max() < exact


def test_with_keep_what_runs_goes_on_from_the_states_that_it_has() -> None:
    first = tiny_model("lfm2")
    second = changed(first)
    engine = TransformersEngine(copy.deepcopy(first), (), slots=4, on_new_weights="keep")
    engine.add(requests()[:4])
    engine.step()
    engine.load(LoadedPolicy.of(3, second.state_dict()))
    written = finish(engine)
    assert all(one.version_spans[1] == VersionSpan(3, 1, len(one.token_ids)) for one in written)
    assert max(gap(second, one, start=1) for one in written) > 0.01  # they are the old weights'


def test_long_prompts_are_started_in_parts() -> None:
    model = tiny_model("gemma3_text", sliding_window=8)
    engine = TransformersEngine(copy.deepcopy(model), (), slots=12, prefill_tokens=20)
    engine.add(requests())
    for _ in range(3):
        engine.step()
    engine.load(LoadedPolicy.of(1, model.state_dict()))
    assert max(gap(model, one) for one in finish(engine)) < 1e-4
