"""Logprobs over a vocabulary equal the naive ones, within a memory bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from onstream.pipeline.models import logprobs
from onstream.pipeline.models.logprobs import OutputHead, largest, token_logprobs
from tests.widest import Widest


@pytest.mark.parametrize("vocabulary", [50, 1003])
def test_chunked_logprobs_and_their_tail_equal_the_naive_ones(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CACHED", 3 * vocabulary)
    torch.manual_seed(0)
    hidden = torch.randn(37, 16)
    head = nn.Linear(16, vocabulary)
    targets = torch.randint(0, vocabulary, (37,))
    found = token_logprobs(
        hidden, OutputHead(head.weight, head.bias), targets, temperature=0.7, top_k=4, chunk=8
    )
    expected = (head(hidden) / 0.7).log_softmax(-1).detach()
    top = expected.topk(4)
    assert found.top is not None
    torch.testing.assert_close(found.sampled, expected.gather(1, targets[:, None])[:, 0])
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


@pytest.mark.parametrize("high", [[7, 22, 52, 999], [0, 1, 2, 3], [1002, 1001, 960, 0]])
def test_the_largest_are_found_in_one_column_of_all_stripes_and_beyond_the_last(
    high: list[int],
) -> None:
    logits = torch.randn(2, 1003, generator=torch.Generator().manual_seed(0))
    logits[0, high] += torch.tensor([50.0, 40.0, 30.0, 20.0])
    values, ids = largest(logits, 4)
    assert ids[0].tolist() == high
    assert torch.equal(values, logits.topk(4).values)
