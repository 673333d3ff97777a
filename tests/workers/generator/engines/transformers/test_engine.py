"""What the engine writes is what plain forward passes would give, whoever shares the batch and
whenever weights change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from onstream.pipeline.errors import UserError
from onstream.pipeline.records import VersionSpan
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.transformers.decoder_choice import slots_for
from onstream.workers.generator.engines.transformers.engine import TransformersEngine

EXACT = 1e-5
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(3, 128, size).astype(np.int32) for size in (5, 23, 9, 40, 2, 17)]


def requests(
    count: int = 24, temperature: float = 1.0, max_tokens: int | None = None
) -> list[GenerationRequest]:
    """`count` requests in groups of four, each with its own length."""
    return [
        GenerationRequest(
            key,
            PROMPTS[key // 4 % len(PROMPTS)],
            max_tokens or 3 + key * 5 % 11,
            seed=1000 + key,
            temperature=temperature,
        )
        for key in range(count)
    ]


def finish(engine: TransformersEngine) -> dict[int, Completion]:
    completions = []
    while engine.active:
        completions += engine.step()
    return {completion.key: completion for completion in completions}


def run(
    model: Any,
    wanted: Sequence[GenerationRequest],
    slots: int = 8,
    stop: Sequence[int] = (),
    **options: Any,
) -> dict[int, Completion]:
    engine = TransformersEngine(copy.deepcopy(model), stop, slots=slots, **options)
    engine.add(wanted)
    return finish(engine)


def chosen(logprobs: Any, token_ids: Any) -> Any:
    return logprobs[np.arange(len(token_ids)), token_ids]


@pytest.mark.parametrize(
    "temperature",
    [1.0, 0.7, 0.0],
    ids=["one", "cooler", "greedy"],
)
def test_every_logprob_equals_a_plain_forward_pass(
    student: Any, plain_logprobs: Callable[..., Any], temperature: float
) -> None:
    wanted = requests(temperature=temperature)
    written = run(student, wanted)
    assert written.keys() == set(range(24))
    for request in wanted:
        one = written[request.key]
        plain = plain_logprobs(request.prompt_ids, one.token_ids, temperature or 1.0)
        assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < EXACT
        if temperature == 0:
            assert one.token_ids.tolist() == plain.argmax(axis=-1).tolist()
        assert len(one.token_ids) == request.max_tokens and one.finish_reason == "length"


def test_requests_admitted_in_the_middle_are_exact_too(
    student: Any, plain_logprobs: Callable[..., Any]
) -> None:
    wanted = requests(max_tokens=9)
    engine = TransformersEngine(student, (), slots=16)
    completions = []
    for (
        request
    ) in wanted:  # one more at each step, so that every admission meets rows in all stages
        engine.add([request])
        completions += engine.step()
    completions += finish(engine).values()
    assert len(completions) == len(wanted)
    for one in completions:
        plain = plain_logprobs(wanted[one.key].prompt_ids, one.token_ids)
        assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < EXACT


def test_a_request_gives_the_same_completion_in_whatever_company(student: Any) -> None:
    wanted = requests()
    alone = {
        request.key: run(student, [request])[request.key].token_ids.tolist()
        for request in wanted[::5]
    }
    for slots, order in ((24, wanted), (5, wanted[::-1])):
        together = run(student, order, slots=slots)
        assert {key: together[key].token_ids.tolist() for key in alone} == alone


def test_requests_of_one_prompt_differ_by_their_seeds(student: Any) -> None:
    written = run(student, [GenerationRequest(key, PROMPTS[1], 12, seed=key) for key in range(4)])
    assert len({tuple(one.token_ids.tolist()) for one in written.values()}) == 4


def test_a_completion_stops_at_an_end_token_and_keeps_it(
    student: Any, plain_logprobs: Callable[..., Any]
) -> None:
    free = run(student, requests(8, max_tokens=12))
    end = int(free[3].token_ids[5])
    stopped = run(student, requests(8, max_tokens=12), stop=[end])
    for key, one in stopped.items():
        ids = free[key].token_ids.tolist()
        expected = ids[: ids.index(end) + 1] if end in ids else ids
        assert one.token_ids.tolist() == expected
        assert one.finish_reason == ("stop" if end in ids else "length")


def test_new_weights_between_steps_write_every_later_token_and_the_spans_say_so(
    student: Any, other_weights: dict[str, torch.Tensor], plain_logprobs: Callable[..., Any]
) -> None:
    wanted = requests(12, max_tokens=10)
    first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    engine = TransformersEngine(student, (), slots=8)
    engine.load(LoadedPolicy.of(4, first))
    engine.add(wanted)
    for _ in range(3):
        assert engine.step() == []
    engine.load(LoadedPolicy.of(7, other_weights))
    for key, one in finish(engine).items():
        old = VersionSpan(4, 0, 3)
        new = VersionSpan(7, 3, 10)
        assert one.version_spans == ([old, new] if key < 8 else [VersionSpan(7, 0, 10)])
        for span in one.version_spans:
            plain = plain_logprobs(
                wanted[key].prompt_ids,
                one.token_ids,
                weights=first if span.version == 4 else other_weights,
            )
            difference = np.abs(chosen(plain, one.token_ids) - one.logprobs)[span.start : span.end]
            assert difference.max() < EXACT


def test_two_versions_loaded_before_the_next_step_leave_no_empty_span(
    student: Any, other_weights: dict[str, torch.Tensor]
) -> None:
    engine = TransformersEngine(student, (), slots=4)
    engine.add(requests(4, max_tokens=4))
    engine.step()
    engine.load(LoadedPolicy.of(1, other_weights))
    engine.load(LoadedPolicy.of(2, other_weights))
    assert {tuple(one.version_spans) for one in finish(engine).values()} == {
        (VersionSpan(0, 0, 1), VersionSpan(2, 1, 4))
    }


def test_kept_keys_and_values_are_labelled_with_the_new_version_all_the_same(
    student: Any, other_weights: dict[str, torch.Tensor], plain_logprobs: Callable[..., Any]
) -> None:
    engine = TransformersEngine(student, (), slots=4, on_new_weights="keep")
    engine.add(requests(4, max_tokens=6))
    engine.step()
    engine.load(LoadedPolicy.of(3, other_weights))
    written = finish(engine)
    assert {tuple(one.version_spans) for one in written.values()} == {
        (VersionSpan(0, 0, 1), VersionSpan(3, 1, 6))
    }
    gaps = [
        np.abs(
            chosen(plain_logprobs(PROMPTS[0], one.token_ids, weights=other_weights), one.token_ids)
            - one.logprobs
        )[1:].max()
        for one in written.values()
    ]
    assert max(gaps) > 0.01  # what `recompute` is there to avoid


def test_a_small_prefill_budget_spreads_admission_and_recomputation_over_steps(
    student: Any, other_weights: dict[str, torch.Tensor], plain_logprobs: Callable[..., Any]
) -> None:
    wanted = requests(max_tokens=10)
    engine = TransformersEngine(student, (), slots=24, prefill_tokens=30)
    engine.add(wanted)
    engine.step()
    assert engine.slots == 24 and engine.active == 24
    for _ in range(4):
        engine.step()
    engine.load(LoadedPolicy.of(1, other_weights))
    written = finish(engine)
    for request in wanted:
        one = written[request.key]
        new = [span for span in one.version_spans if span.version == 1]
        plain = plain_logprobs(request.prompt_ids, one.token_ids, weights=other_weights)
        for span in new:
            assert (
                np.abs(chosen(plain, one.token_ids) - one.logprobs)[span.start : span.end].max()
                < EXACT
            )
    assert sum(len(one.version_spans) == 2 for one in written.values()) > 8


@pytest.fixture
def taken(student: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of packed tokens of every forward pass of the engine."""
    sizes: list[int] = []
    forward = student.forward

    def counting(**inputs: Any) -> Any:
        if "onstream_pass" in inputs:
            sizes.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(student, "forward", counting)
    return sizes


def test_neighbours_with_one_prompt_share_its_computation(student: Any, taken: list[int]) -> None:
    engine = TransformersEngine(student, (), slots=8)
    taken.clear()
    engine.add([GenerationRequest(key, PROMPTS[key // 4], 3, seed=key) for key in range(8)])
    finish(engine)
    assert taken == [len(PROMPTS[0]) + len(PROMPTS[1]), 8, 8]


def test_new_weights_compute_a_shared_prompt_once_again(
    student: Any, other_weights: dict[str, torch.Tensor], taken: list[int]
) -> None:
    engine = TransformersEngine(student, (), slots=8)
    engine.add([GenerationRequest(key, PROMPTS[key // 4], 4, seed=key) for key in range(8)])
    engine.step()
    engine.step()
    engine.load(LoadedPolicy.of(1, other_weights))
    taken.clear()
    finish(engine)
    assert taken == [len(PROMPTS[0]) + len(PROMPTS[1]) + 8 * 2, 8]


def test_a_group_waits_a_moment_rather_than_being_split(student: Any, taken: list[int]) -> None:
    engine = TransformersEngine(student, (), slots=32)
    engine.add(
        [GenerationRequest(key, PROMPTS[2], 2 if key < 3 else 3, seed=key) for key in range(32)]
    )
    engine.step()
    engine.step()
    engine.add([GenerationRequest(key, PROMPTS[3], 2, seed=key) for key in range(100, 104)])
    taken.clear()
    assert len(finish(engine)) == 33
    assert taken == [
        29,
        len(PROMPTS[3]),
        4,
    ]  # for one step three slots stand idle, too few for the group of four


def test_a_step_takes_no_more_new_tokens_than_its_budget(student: Any, taken: list[int]) -> None:
    engine = TransformersEngine(student, (), slots=24, prefill_tokens=30)
    taken.clear()
    engine.add(requests(max_tokens=10))
    finish(engine)
    assert max(taken) <= 30 + 24 + 40 and taken[0] == len(
        PROMPTS[0]
    )  # the second prompt of 23 would make a grid of 2 × 23
    assert taken[1] == 4 + len(PROMPTS[1])


def test_the_cache_grows_under_running_completions(
    student: Any, plain_logprobs: Callable[..., Any]
) -> None:
    wanted = [
        GenerationRequest(key, PROMPTS[3], 50, seed=key) for key in range(3)
    ]  # 40 + 50 tokens: more than the cache begins with
    for one in run(student, wanted, slots=4).values():
        plain = plain_logprobs(PROMPTS[3], one.token_ids)
        assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < EXACT


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
        Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=4)),
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
            )
        ),
    ],
    ids=["llama", "qwen2", "gpt2"],
)
def test_other_models_with_full_attention_are_served(model: Any) -> None:
    model.eval()
    pristine = copy.deepcopy(model)
    prompt = np.arange(5, 25, dtype=np.int32)
    one = run(model, [GenerationRequest(0, prompt, 9, seed=1)])[0]
    ids = torch.tensor(np.concatenate([prompt, one.token_ids]), dtype=torch.long)[None]
    with torch.no_grad():
        plain = pristine(input_ids=ids, use_cache=False).logits[0, 19:-1].log_softmax(-1).numpy()
    assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < EXACT


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=8)),
            "see 8 tokens back",
        ),
        (
            BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)),
            "does not go through the AttentionInterface",
        ),
    ],
    ids=["sliding window", "no interface"],
)
def test_a_model_that_slots_do_not_compute_decodes_from_its_own_cache(
    model: Any, words: str
) -> None:
    pristine = copy.deepcopy(model.eval())
    engine = TransformersEngine(model, (), slots=4)
    assert words in (engine.own_cache_because or "")
    prompt = np.arange(5, 25, dtype=np.int32)
    engine.add([GenerationRequest(0, prompt, 9, seed=1)])
    one = finish(engine)[0]
    ids = torch.tensor(np.concatenate([prompt, one.token_ids]), dtype=torch.long)[None]
    with torch.no_grad():
        plain = pristine(input_ids=ids, use_cache=False).logits[0, 19:-1].log_softmax(-1).numpy()
    assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < EXACT


def test_a_model_that_cannot_be_served_is_refused_at_once() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertLMHeadModel(
        BertConfig(**shape, intermediate_size=48, initializer_range=0.5)
    )  # not a decoder
    with pytest.raises(
        UserError, match=r"differ by .* and through the model's own cache: its code keeps none"
    ):
        TransformersEngine(model.eval(), (), slots=4)


def test_weights_of_another_shape_are_refused_and_nothing_changes(
    student: Any, other_weights: dict[str, torch.Tensor]
) -> None:
    engine = TransformersEngine(student, (), slots=4)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    torn = {**other_weights, "model.norm.weight": torch.ones(3)}
    lacking = {
        name: tensor for name, tensor in other_weights.items() if name != "model.norm.weight"
    }
    for weights, words in (
        (torn, r"model.norm.weight \[3\], not \[48\]"),
        (lacking, "missing .'model.norm.weight'"),
    ):
        with pytest.raises(WeightsError, match=words):
            engine.load(LoadedPolicy.of(1, weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_weights_may_leave_out_a_tied_head(
    student: Any, other_weights: dict[str, torch.Tensor]
) -> None:
    engine = TransformersEngine(student, (), slots=4)
    headless = {name: tensor for name, tensor in other_weights.items() if name != "lm_head.weight"}
    engine.load(LoadedPolicy.of(1, headless))
    assert torch.equal(student.lm_head.weight, other_weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [([], 3), ([1, 2], 0), (range(60), 40)],
    ids=["no prompt", "no token", "too long"],
)
def test_a_request_that_cannot_be_written_is_refused(
    student: Any, prompt: Sequence[int], tokens: int
) -> None:
    engine = TransformersEngine(student, (), slots=4)
    with pytest.raises(ValueError, match="request 0"):
        engine.add([GenerationRequest(0, np.array(prompt, dtype=np.int32), tokens, seed=0)])
    assert engine.active == 0


def test_in_bfloat16_logprobs_are_those_of_a_bfloat16_forward_pass(student: Any) -> None:
    student.to(torch.bfloat16)
    pristine = copy.deepcopy(student)
    for key, one in run(student, requests(8)).items():
        prompt = PROMPTS[key // 4]
        ids = torch.tensor(np.concatenate([prompt, one.token_ids]), dtype=torch.long)[None]
        with torch.no_grad():
            plain = (
                pristine(input_ids=ids, use_cache=False)
                .logits[0, len(prompt) - 1 : -1]
                .float()
                .log_softmax(-1)
                .numpy()
            )
        assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < 0.15


def test_with_wait_each_completion_has_one_version_and_no_other_starts_meanwhile(
    student: Any, other_weights: dict[str, torch.Tensor], plain_logprobs: Callable[..., Any]
) -> None:
    engine = TransformersEngine(student, (), slots=4, on_new_weights="wait")
    engine.add(requests(6, max_tokens=5))
    engine.step()
    engine.load(LoadedPolicy.of(1, student.state_dict()))
    engine.load(LoadedPolicy.of(2, other_weights))  # overtakes the one that still waits
    assert engine.version == 0
    written = [one for _ in range(4) for one in engine.step()]
    assert sorted(one.key for one in written) == [0, 1, 2, 3] and engine.version == 0
    assert {tuple(one.version_spans) for one in written} == {(VersionSpan(0, 0, 5),)}
    for key, one in finish(engine).items():
        assert engine.version == 2 and one.version_spans == [VersionSpan(2, 0, 5)]
        plain = plain_logprobs(PROMPTS[key // 4], one.token_ids, weights=other_weights)
        assert np.abs(chosen(plain, one.token_ids) - one.logprobs).max() < EXACT


def test_new_weights_are_loaded_at_once_where_nothing_runs_that_they_would_wait_for(
    student: Any, other_weights: dict[str, torch.Tensor]
) -> None:
    engine = TransformersEngine(student, (), slots=4, on_new_weights="wait")
    engine.load(LoadedPolicy.of(3, other_weights))
    assert engine.version == 3


def test_an_abort_writes_the_same_as_recomputing(
    student: Any, other_weights: dict[str, torch.Tensor]
) -> None:
    first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    written = []
    for mode in ("recompute", "abort"):
        engine = TransformersEngine(student, (), slots=4, on_new_weights=mode)
        engine.load(LoadedPolicy.of(0, first))
        engine.add(requests(4, max_tokens=6))
        engine.step()
        engine.load(LoadedPolicy.of(1, other_weights))
        written.append(
            {
                key: (one.token_ids.tolist(), one.version_spans)
                for key, one in finish(engine).items()
            }
        )
        assert all(
            spans == [VersionSpan(0, 0, 1), VersionSpan(1, 1, 6)]
            for _, spans in written[-1].values()
        )
        student = engine._model
        student.set_attn_implementation("sdpa")
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("device", "hidden", "batch_size", "max_batch", "expected"),
    [
        ("cpu", 512, 128, 256, 128),
        ("cpu", 512, 8, 256, 64),
        ("cpu", 512, 128, 16, 16),
        ("cpu", 64, 128, 256, 256),
        ("cuda", 512, 128, 256, 256),
    ],
)
def test_a_cpu_decodes_no_more_of_a_wide_student_than_a_step_takes(
    device: str, hidden: int, batch_size: int, max_batch: int, expected: int
) -> None:
    given = {"orchestrator": {"batch_size": batch_size}, "inference": {"max_batch": max_batch}}
    settings = Settings.model_validate(given)
    assert slots_for(settings, hidden, torch.device(device)) == expected
