"""SharedPrefixRow equals one-by-one, chunked equals naive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onstream.pipeline.models import forward, packing
from onstream.pipeline.models.forward import (
    SHARED_PREFIX,
    VARLEN,
    OutputHead,
    entropy_of,
    hidden_states,
    rows_for,
    token_logprobs,
)
from onstream.pipeline.models.loading import set_text_attention
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import Ids, pack, share_prompts
from onstream.pipeline.models.prompt_sharing import prepare
from tests.tiny import Family, sequences, tiny_model
from tests.widest import Widest


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
        logits = head_of(model).logits(hidden_states(model, packed))
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


def test_chunked_logprobs_and_their_tail_equal_the_naive_ones() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16)
    head = nn.Linear(16, 50)
    targets = torch.randint(0, 50, (37,))
    found = token_logprobs(
        hidden, OutputHead(head.weight, head.bias), targets, temperature=0.7, top_k=4, chunk=8
    )
    logprobs = (head(hidden) / 0.7).log_softmax(-1).detach()
    top = logprobs.topk(4)
    assert found.top is not None
    torch.testing.assert_close(found.sampled, logprobs.gather(1, targets[:, None])[:, 0])
    scaled = head(hidden).detach() / 0.7
    entropy = entropy_of(logprobs.exp(), scaled.log_softmax(-1))
    torch.testing.assert_close(entropy, -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(found.top.logprobs, top.values)
    assert torch.equal(found.top.ids, top.indices)
    torch.testing.assert_close(
        found.top.logprobs.exp().sum(-1) + found.top.tail.exp(), torch.ones(37)
    )


def test_the_tail_of_a_confident_model_is_exact_where_one_less_the_sum_would_be_nothing() -> None:
    head = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[40.0], [0.0], [0.0], [-1.0]]))
    found = token_logprobs(torch.ones(1, 1), OutputHead(head.weight), torch.tensor([0]), top_k=2)
    assert found.top is not None
    assert 1 - found.top.logprobs.exp().sum().item() == 0
    assert found.top.tail.item() == pytest.approx(math.log(1 + math.exp(-1)) - 40, abs=1e-5)


def test_a_top_k_without_a_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 5; expected less than the vocabulary of 5"):
        token_logprobs(torch.ones(1, 2), OutputHead(torch.zeros(5, 2)), torch.tensor([0]), top_k=5)


def test_no_tensor_of_more_than_one_chunk_of_logits_is_made() -> None:
    hidden = torch.randn(256, 8)
    head = nn.Linear(8, 1000)
    targets = torch.zeros(256, dtype=torch.long)
    with Widest() as widest:
        token_logprobs(hidden, OutputHead(head.weight, head.bias), targets, top_k=4, chunk=16)
    assert widest.elements == 16 * 1000


def test_hidden_states_come_in_the_order_of_the_targets() -> None:
    model = tiny_model()
    assert prepare(model) is None
    assert model.config._attn_implementation == SHARED_PREFIX
    prompts, completions = sequences(3, 2, seed=1)
    (packed,) = pack(share_prompts(prompts, completions), 1000)
    assert hidden_states(model, packed).shape == (sum(map(len, completions)), 32)
