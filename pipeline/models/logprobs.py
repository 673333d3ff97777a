"""From hidden states to logprobs over the vocabulary: the output layer, and what is read off it.

The products of many positions are computed at once. What reads their logits does so a few rows at
a time, in several passes: on a CPU these rows are in its cache then, and passes over all logits
take two to eight times as long (65,536 tokens in the vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CACHED = 1 << 18
"""Logits that are read together: 1 MiB in float32, of the 1 to 2 MiB that a core has to itself."""
ON_GPU = 1 << 24
"""The same on a GPU, where it only bounds the memory of the passes; untried on one."""
STRIPES = 64
"""Of how many tokens, each from another stripe of the vocabulary, the likeliest one is found."""


@dataclass(frozen=True)
class OutputHead:
    """logits = cap · tanh(scale · (hidden · weightᵀ + bias) / cap); without a cap, the scaled ones.

    Args:
        weight: [V, H].
        bias: [V].
        scale: of the logits (Granite, Cohere, MiniCPM).
        cap: what no logit exceeds; None: there is no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def out_features(self) -> int:
        """V."""
        return self.weight.shape[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor, memory: LogitsMemory | None = None) -> Tensor:
        """Float32 logits [n, V] of `hidden` [n, H], multiplied in the precision of `hidden`.

        Without gradient; in `memory`, where it is given.
        """
        memory = memory or LogitsMemory.of(hidden, self)
        product, logits = memory.product[: len(hidden)], memory.logits[: len(hidden)]
        weight = self.weight.to(hidden.dtype)
        if self.bias is None:
            torch.mm(hidden, weight.t(), out=product)
        else:
            torch.addmm(self.bias.to(hidden.dtype), hidden, weight.t(), out=product)
        if product.dtype != logits.dtype:
            logits.copy_(product)
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def with_weight(self, weight: Tensor) -> OutputHead:
        """The same with `weight`, say of another precision or with fewer rows."""
        bias = None if self.bias is None else self.bias[: len(weight)]
        return OutputHead(weight, bias, self.scale, self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of `logits` by the product of hidden states and weight, elementwise.

        [n, V] where there is a cap, otherwise one number. `logits` stay as they are.
        """
        if self.cap is None:
            return self.scale
        return (1 - (logits / self.cap) ** 2) * self.scale


@dataclass(frozen=True)
class LogitsMemory:
    """What chunks of up to n positions compute their logits in, one after the other.

    Fresh memory of this size costs as much as a pass over it.
    """

    logits: Tensor  # [n, V], float32
    product: Tensor  # [n, V], in the precision of the hidden states; in float32 it is `logits`

    @classmethod
    def of(cls, hidden: Tensor, head: OutputHead) -> LogitsMemory:
        """Memory for as many positions as `hidden` [n, H] has."""
        shape = (len(hidden), head.out_features)
        logits = hidden.new_empty(shape, dtype=torch.float32)
        return cls(logits, logits if hidden.dtype == torch.float32 else hidden.new_empty(shape))


def cached_rows(logits: Tensor) -> Iterator[slice]:
    """The rows of `logits` [n, V] in parts that a core's cache holds."""
    rows = max(1, (ON_GPU if logits.is_cuda else CACHED) // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


@dataclass(frozen=True)
class TopLogprobs:
    """The k likeliest tokens of N positions, and all others together as a tail. Float32, nats."""

    ids: Tensor  # [N, k], likeliest first
    logprobs: Tensor  # [N, k]
    tail: Tensor  # [N]


@dataclass(frozen=True)
class TokenLogprobs:
    """The logprobs of N positions. Float32, nats."""

    sampled: Tensor  # [N], logprobs of the targets
    top: TopLogprobs | None  # with top_k > 0


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    chunk: int = 1024,
) -> TokenLogprobs:
    """Logprobs of `targets` [N] given `hidden` [N, H], at `temperature`.

    At most [chunk, V] logits exist at once. With `top_k` = k > 0 there are also the k likeliest
    tokens of each position and the tail: the logprob of all others together. The tail is summed
    over the other logits, since 1 − Σ of the k would round to 0 where the model is confident.

    Raises:
        ValueError: `top_k` leaves no tail.
    """
    if top_k >= head.out_features:
        raise ValueError(
            f"top_k is {top_k}; expected less than the vocabulary of {head.out_features}, "
            "so that a tail remains"
        )
    memory = LogitsMemory.of(hidden[:chunk], head)
    parts = []
    for states, ids in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        logits = head.logits(states, memory)
        for at in cached_rows(logits):
            parts.append(_row_logprobs(logits[at], ids[at], temperature, top_k))
    sampled, *top = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLogprobs(sampled, TopLogprobs(*top) if top else None)


def _row_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, top_k: int
) -> tuple[Tensor, ...]:
    """Sampled [n]; with `top_k` also ids [n, k], logprobs [n, k] and tail [n]. Logits are used up.

    The likeliest tokens are taken out before the others are summed, so each logit is read once.
    """
    if temperature != 1.0:
        logits /= temperature
    sampled = logits.gather(1, targets[:, None])[:, 0]
    if not top_k:
        return (sampled - logits.logsumexp(-1),)
    top, ids = largest(logits, top_k)
    tail = logits.scatter_(1, ids, float("-inf")).logsumexp(-1)
    total = torch.logaddexp(top.logsumexp(-1), tail)
    return sampled - total, ids, top - total[:, None], tail - total


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `logits` [n, V], and where they are, [n, k] each.

    `topk` sorts, which on a CPU takes longer than all else. The vocabulary is cut into stripes, and
    the tokens at one place of all stripes are a column. The k largest are in the k columns with the
    largest maxima, or beyond the last stripe: only these are sorted.
    """
    rows, vocabulary = logits.shape
    width = vocabulary // STRIPES
    if logits.is_cuda or width < 2 * k:
        whole = logits.topk(k)
        return whole.values, whole.indices
    maxima = logits[:, : width * STRIPES].view(rows, STRIPES, width).amax(1)
    columns = maxima.topk(k).indices
    stripes = torch.arange(0, width * STRIPES, width)
    candidates = (columns[:, None, :] + stripes[:, None]).flatten(1)
    beyond = torch.arange(width * STRIPES, vocabulary).expand(rows, -1)
    candidates = torch.cat((candidates, beyond), 1)
    values, places = logits.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)
