"""Head and loss in chunks equal the naive way, in value and gradient, within a memory bound."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from onstream.pipeline.models.logprobs import OutputHead
from onstream.workers.trainer.chunked_loss import (
    TargetTokens,
    TokenLoss,
    TrainerLogprobs,
    chunked_loss,
)
from tests.widest import Widest

TOKENS = 23
HIDDEN = 12
VOCABULARY = 40
TOP_K = 4


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def naive_logprobs(hidden: Tensor, head: nn.Linear, targets: TargetTokens) -> TrainerLogprobs:
    """All logits at once, by autograd alone."""
    return logprobs_of(head(hidden), targets)


def logprobs_of(logits: Tensor, targets: TargetTokens) -> TrainerLogprobs:
    heat = 1.0 if targets.temperatures is None else targets.temperatures[:, None]
    scaled = (logits / heat).log_softmax(-1)
    unscaled = logits.log_softmax(-1)
    top = tail = None
    if targets.top_ids is not None:
        top = unscaled.gather(1, targets.top_ids)
        tail = unscaled.scatter(1, targets.top_ids, float("-inf")).logsumexp(-1)
    entropy = -(scaled.exp() * scaled).sum(-1).detach()
    ids = targets.ids[:, None]
    return TrainerLogprobs(
        scaled.gather(1, ids)[:, 0],
        unscaled.gather(1, ids)[:, 0].detach(),
        entropy,
        top,
        tail,
    )


def some_loss(weights: Tensor) -> TokenLoss:
    """A loss that uses every logprob, each token with a weight of its own."""

    def loss(at: slice, logprobs: TrainerLogprobs) -> Tensor:
        value = logprobs.sampled.exp() * logprobs.sampled_unscaled + 0.1 * logprobs.entropy
        if logprobs.top is not None and logprobs.tail is not None:
            value = (
                value
                + (logprobs.top.exp() * logprobs.top).sum(-1)
                + logprobs.tail.exp() * (logprobs.tail - logprobs.sampled)
            )
        return weights[at] * value

    return loss


def output_head(linear: nn.Linear, scale: float = 1.0, cap: float | None = None) -> OutputHead:
    return OutputHead(linear.weight, linear.bias, scale, cap)


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heated", [False, True])
@pytest.mark.parametrize("top", [False, True])
def test_values_and_gradients_equal_the_naive_ones(
    top: bool,
    heated: bool,
    bias: bool,
    chunk: int,
    draw: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onstream.pipeline.models.logprobs.CACHED", 5 * VOCABULARY)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw).requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    targets = TargetTokens(
        ids=torch.randint(0, VOCABULARY, (TOKENS,), generator=draw),
        temperatures=torch.rand(TOKENS, generator=draw) + 0.5 if heated else None,
        top_ids=torch.rand(TOKENS, VOCABULARY, generator=draw).topk(TOP_K).indices if top else None,
    )
    loss = some_loss(torch.randn(TOKENS, generator=draw))
    expected = loss(slice(None), naive_logprobs(hidden, head, targets)).sum() / 3
    expected_gradients = torch.autograd.grad(expected, [hidden, *head.parameters()])
    found = chunked_loss(hidden, output_head(head), targets, loss, chunk=chunk) / 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(found, [hidden, *head.parameters()]), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "cap"), [(0.125, None), (1.0, 2.0), (3.0, 2.0)])
def test_scaled_and_capped_logits_have_the_gradients_of_autograd(
    scale: float, cap: float | None, draw: torch.Generator
) -> None:
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw).requires_grad_()
    linear = nn.Linear(HIDDEN, VOCABULARY)
    head = output_head(linear, scale, cap)
    top_ids = torch.rand(TOKENS, VOCABULARY, generator=draw).topk(TOP_K).indices
    targets = TargetTokens(
        torch.randint(0, VOCABULARY, (TOKENS,), generator=draw),
        torch.rand(TOKENS, generator=draw) + 0.5,
        top_ids,
    )
    loss = some_loss(torch.randn(TOKENS, generator=draw))
    logits = linear(hidden) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = loss(slice(None), logprobs_of(logits, targets)).sum()
    wanted = torch.autograd.grad(expected, [hidden, *linear.parameters()])
    found = chunked_loss(hidden, head, targets, loss, chunk=7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, want in zip(
        torch.autograd.grad(found, [hidden, *linear.parameters()]), wanted, strict=True
    ):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sure", [20.0, 80.0, 300.0])
@pytest.mark.parametrize("heated", [False, True])
def test_the_tail_of_a_sure_student_is_exact_where_float32_has_no_probability_for_it(
    heated: bool, sure: float, draw: torch.Generator
) -> None:
    logits = torch.randn(4, VOCABULARY, generator=draw)
    logits[:2, 3] += sure  # two rows that are sure, and two that are not
    top_ids = torch.tensor([[3, 1], [3, 1], [4, 4], [5, 6]])  # one is repeated to fill a row
    targets = TargetTokens(
        torch.tensor([3, 2, 1, 0]), torch.tensor([0.7, 1.0, 1.3, 1.0]) if heated else None, top_ids
    )

    def loss(_: slice, logprobs: TrainerLogprobs) -> Tensor:
        assert logprobs.top is not None and logprobs.tail is not None
        return logprobs.sampled + 2 * logprobs.top[:, 0] + 3 * logprobs.tail

    exact = logits.double().requires_grad_()
    expected = loss(slice(None), logprobs_of(exact, targets)).sum()
    (wanted,) = torch.autograd.grad(expected, [exact])
    hidden = logits.clone().requires_grad_()
    found = chunked_loss(hidden, OutputHead(torch.eye(VOCABULARY)), targets, loss, chunk=3)
    (gradient,) = torch.autograd.grad(found, [hidden])
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_gradient_equals_a_finite_difference(draw: torch.Generator) -> None:
    hidden = torch.randn(3, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY).double()
    targets = TargetTokens(
        torch.tensor([1, 2, 3]),
        torch.tensor([0.7, 1.0, 1.3]),
        torch.tensor([[0, 1], [5, 6], [7, 9]]),
    )

    def value(hidden: Tensor) -> Tensor:
        return chunked_loss(
            hidden,
            output_head(head),
            targets,
            lambda _, logprobs: logprobs.sampled + 2 * logprobs.tail,
            chunk=2,
        )  # type: ignore[operator]

    (found,) = torch.autograd.grad(value(hidden), hidden)
    step = torch.zeros_like(hidden)
    step[1, 4] = 0.05
    difference = (value(hidden + step) - value(hidden - step)).item() / 0.1
    assert found[1, 4].item() == pytest.approx(difference, rel=1e-2)


def test_a_frozen_head_still_hands_the_gradient_on(draw: torch.Generator) -> None:
    hidden = torch.randn(5, HIDDEN, generator=draw)
    head = nn.Linear(HIDDEN, VOCABULARY)
    targets = TargetTokens(torch.arange(5))
    loss = some_loss(torch.ones(5))
    found = []
    for frozen in (False, True):
        leaf = hidden.clone().requires_grad_()
        head.requires_grad_(not frozen)
        chunked_loss(leaf, output_head(head), targets, loss, chunk=2).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_the_logprobs_are_handed_over_once_a_chunk_and_in_order() -> None:
    seen: list[tuple[int, int]] = []

    def loss(at: slice, logprobs: TrainerLogprobs) -> Tensor:
        seen.append((at.start, at.stop))
        return logprobs.sampled

    chunked_loss(
        torch.zeros(10, 3),
        output_head(nn.Linear(3, 5)),
        TargetTokens(torch.zeros(10, dtype=torch.long)),
        loss,
        chunk=4,
    )
    assert seen == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("chunk", [1, 5, TOKENS])
def test_the_heads_gradient_is_summed_in_float32_where_hidden_states_are_bfloat16(
    chunk: int, draw: torch.Generator
) -> None:
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw).bfloat16().requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    targets = TargetTokens(torch.randint(0, VOCABULARY, (TOKENS,), generator=draw))
    loss = some_loss(torch.randn(TOKENS, generator=draw))
    logits = output_head(head).logits(hidden).detach().requires_grad_()
    (by_logits,) = torch.autograd.grad(
        loss(slice(None), logprobs_of(logits, targets)).sum(), [logits]
    )
    expected = by_logits.double().t() @ hidden.detach().double()

    chunked_loss(hidden, output_head(head), targets, loss, chunk=chunk).backward()

    assert head.weight.grad is not None
    gap = float((head.weight.grad - expected).norm() / expected.norm())
    print(f"chunks of {chunk}: {gap:.1e}")
    assert gap < 1e-6


def test_memory_grows_with_the_chunk_and_not_with_the_tokens() -> None:
    head = nn.Linear(8, 3000, bias=False)
    for tokens in (64, 512):
        hidden = torch.randn(tokens, 8).requires_grad_()
        top_ids = torch.arange(4).expand(tokens, 4)
        targets = TargetTokens(
            torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), 0.9), top_ids
        )
        with Widest() as widest:
            chunked_loss(
                hidden, output_head(head), targets, some_loss(torch.ones(tokens)), chunk=16
            ).backward()
        assert widest.elements == 16 * 3000


@pytest.mark.parametrize(
    "loss", [lambda at, logprobs: 0 * logprobs.sampled, lambda at, logprobs: logprobs.entropy * 0]
)
def test_a_loss_without_effect_has_no_gradient(
    loss: Callable[[slice, TrainerLogprobs], Tensor],
) -> None:
    hidden = torch.randn(5, 3).requires_grad_()
    chunked_loss(
        hidden,
        output_head(nn.Linear(3, 7)),
        TargetTokens(torch.zeros(5, dtype=torch.long)),
        lambda at, s: loss(at, s) + 0 * s.sampled,
        chunk=2,
    ).backward()
    assert hidden.grad is not None and not hidden.grad.any()
