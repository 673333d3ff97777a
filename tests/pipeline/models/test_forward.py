"""SharedPrefixRow equals one-by-one, chunked equals naive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from onstream.pipeline.models import forward, packing
from onstream.pipeline.models.forward import (
    SHARED_PREFIX,
    VARLEN,
    attend,
    hidden_states,
    rows_for,
)
from onstream.pipeline.models.loading import set_text_attention
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import Ids, pack, share_prompts
from onstream.pipeline.models.prompt_sharing import prepare
from tests.tiny import Family, sequences, tiny_model


def one_by_one(model: PreTrainedModel, prompts: list[Ids], completions: list[Ids]) -> list[Tensor]:
    """Logprobs of each completion's tokens, from the model's own forward, one sequence a row."""
    logprobs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate((prompt, completion)))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs.append(
            logits.log_softmax(-1).gather(1, torch.from_numpy(completion)[:, None])[:, 0]
        )
    return logprobs


def packed_logprobs(
    model: PreTrainedModel, prompts: list[Ids], completions: list[Ids], max_tokens: int
) -> list[Tensor]:
    """The same from packed rows."""
    logprobs: dict[int, Tensor] = {}
    for packed in rows_for(model, prompts, completions, None, max_tokens):
        head = head_of(model)
        logits = nn.functional.linear(hidden_states(model, packed), head.weight, head.bias)
        sampled = logits.log_softmax(-1).gather(1, torch.from_numpy(packed.targets)[:, None])[:, 0]
        logprobs |= zip(packed.sequences, sampled.split(packed.lengths), strict=True)
    return [logprobs[sequence] for sequence in range(len(prompts))]


def gradients(model: PreTrainedModel, logprobs: list[Tensor]) -> list[Tensor]:
    """By every weight, of a sum that weighs each token differently."""
    flat = torch.cat(logprobs)
    (flat * torch.linspace(-1, 1, len(flat))).sum().backward()
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("dense_row_tokens", [0, 512])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("max_tokens", [40, 1000])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_packed_rows_give_the_logprobs_and_gradients_of_one_sequence_at_a_time(
    family: Family,
    max_tokens: int,
    group_size: int,
    dense_row_tokens: int,
    start: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "DENSE_ROW_TOKENS", dense_row_tokens)
    model = tiny_model(family)
    prompts, completions = sequences(5, group_size, seed=7)
    prompts = [np.concatenate((np.arange(start), prompt)) for prompt in prompts]
    wanted = one_by_one(model, prompts, completions)
    wanted_gradients = gradients(model, wanted)
    assert prepare(model) is None
    got = packed_logprobs(model, prompts, completions, max_tokens)
    torch.testing.assert_close(torch.cat(got), torch.cat(wanted), rtol=0, atol=1e-5)
    for gradient, expected in zip(gradients(model, got), wanted_gradients, strict=True):
        torch.testing.assert_close(
            gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )


def test_under_masks_a_common_start_is_shared_as_long_as_no_sequence_is_very_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    assert prepare(model) is None
    prompts = [np.array([*range(9), own]) for own in (11, 12)]
    completions = [np.array([13, 14])] * 2
    (row,) = rows_for(model, prompts, completions, None, 100)
    assert row.start == 9
    monkeypatch.setattr(forward, "MASKED_START_TOKENS", 11)
    (row,) = rows_for(model, prompts, completions, None, 100)
    assert row.start == 0
    set_text_attention(model, VARLEN)
    (row,) = rows_for(model, prompts, completions, None, 100)
    assert row.start == 9


def test_padded_rows_give_the_same() -> None:
    model = tiny_model()
    prompts, completions = sequences(5, 3, seed=8)
    wanted = torch.cat(one_by_one(model, prompts, completions))
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(
        torch.cat(packed_logprobs(model, prompts, completions, 50)), wanted, rtol=0, atol=1e-5
    )


def test_a_completion_does_not_see_its_siblings() -> None:
    model = tiny_model()
    assert prepare(model) is None
    prompts, completions = sequences(1, 3, completion=(6, 6), seed=9)
    before = packed_logprobs(model, prompts, completions, 1000)
    after = packed_logprobs(
        model, prompts, [completions[0], (completions[1] + 1) % 48, completions[2]], 1000
    )
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=1e-6)
    assert not torch.allclose(after[1], before[1], atol=1e-2)


def test_hidden_states_come_in_the_order_of_the_targets() -> None:
    model = tiny_model()
    assert prepare(model) is None
    assert model.config._attn_implementation == SHARED_PREFIX
    prompts, completions = sequences(3, 2, seed=1)
    (packed,) = pack(share_prompts(prompts, completions), 1000)
    assert hidden_states(model, packed).shape == (sum(map(len, completions)), 32)


def test_attention_is_in_float32_on_a_cpu_where_products_are_in_bfloat16() -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, 7, 8, generator=draw).bfloat16() for _ in range(3)]
    exact = scaled_dot_product_attention(*(one.float() for one in states), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scaled_dot_product_attention(*states, is_causal=True)
        found = attend(*states, is_causal=True)
    assert torch.equal(found, exact.bfloat16())
    assert not torch.equal(found, rounded)
