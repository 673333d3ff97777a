"""The output layer and the loss in one, a chunk of positions at a time.

The loss reads a few numbers of each position's logits. Its gradient by the logits is known as soon
as the logits are. So each chunk's gradients of the hidden states and of the layer are computed at
once, and the next chunk's logits take the memory. Nothing of size [tokens, vocabulary] is kept, and
nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onstream.pipeline.models.logprobs import LogitsMemory, OutputHead, cached_rows

FAINT = 1e-30
"""A sum of probabilities under which float32 has lost digits of its terms, or all of them."""


@dataclass(frozen=True)
class TargetTokens:
    """Whose logprobs to read off the logits of N positions."""

    ids: Tensor  # [N]
    temperatures: Tensor | None = None  # [N], of sampling; None: 1 everywhere
    top_ids: Tensor | None = None  # [N, k]

    def chunk(self, at: slice) -> TargetTokens:
        """The same for the positions `at`."""
        return TargetTokens(
            self.ids[at],
            None if self.temperatures is None else self.temperatures[at],
            None if self.top_ids is None else self.top_ids[at],
        )


@dataclass(frozen=True)
class TrainerLogprobs:
    """What the weights being trained say of n positions. Float32, nats.

    The loss is differentiated by `sampled`, `top` and `tail`.
    """

    sampled: Tensor  # [n], logprobs of the targets at the sampling temperature
    sampled_unscaled: Tensor  # [n], the same at temperature 1, without gradient
    entropy: Tensor  # [n], at the sampling temperature, without gradient
    top: Tensor | None  # [n, k], logprobs of the given ids, at temperature 1
    tail: Tensor | None  # [n], logprob of all other ids together, at temperature 1


TokenLoss = Callable[[slice, TrainerLogprobs], Tensor]
"""The loss of the positions in a slice, [n]. It may keep values for the metrics."""


def chunked_loss(
    hidden: Tensor, head: OutputHead, targets: TargetTokens, token_loss: TokenLoss, *, chunk: int
) -> Tensor:
    """Σ token_loss over the N positions of `hidden` [N, H].

    It is differentiable by `hidden` and by the head's parameters. At most [chunk, V] logits exist
    at once. `token_loss` is called once a chunk, in order.
    """
    apply: Any = _ChunkedLoss.apply
    loss: Tensor = apply(hidden, head.weight, head.bias, head, targets, token_loss, chunk)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        targets: TargetTokens,
        token_loss: TokenLoss,
        chunk: int,
    ) -> Tensor:
        compute_weight = weight.to(hidden.dtype)
        compute_head = head.with_weight(compute_weight)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        grad_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        memory = _Memory(hidden[:chunk], compute_head, targets)
        for start in range(0, len(hidden), chunk):
            at = slice(start, min(start + chunk, len(hidden)))
            logits = compute_head.logits(hidden[at], memory.logits)
            slope = head.slope(logits)
            loss, grad_logits = _loss_and_gradient(
                logits, targets.chunk(at), partial(token_loss, at), memory
            )
            if not isinstance(slope, float) or slope != 1.0:
                grad_logits *= slope
            total += loss
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            rounded = memory.rounded(grad_logits)
            torch.mm(rounded, compute_weight, out=grad_hidden[at])
            if grad_weight is not None:
                _add_weight_gradient(grad_weight, grad_logits, rounded, hidden[at])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (upstream,) = grads
        # In place: the layer's gradient is as large as the layer. A second backward pass would
        # scale it twice, but autograd refuses one.
        scaled = (None if saved is None else saved.mul_(upstream) for saved in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


class _Memory:
    """What every chunk computes in: fresh memory of this size costs as much as a pass over it."""

    def __init__(self, hidden: Tensor, head: OutputHead, targets: TargetTokens) -> None:
        # Logits, then probabilities, then their gradient; the product is free once they are read.
        self.logits = LogitsMemory.of(hidden, head)
        self.outside = self.logits.logits  # probabilities at temperature 1, less the top ids
        if targets.top_ids is not None and targets.temperatures is not None:
            self.outside = torch.empty_like(self.outside)

    def rounded(self, grad_logits: Tensor) -> Tensor:
        """`grad_logits` [n, V] in the precision of the hidden states."""
        product = self.logits.product[: len(grad_logits)]
        return grad_logits if product.dtype == grad_logits.dtype else product.copy_(grad_logits)


def _loss_and_gradient(
    logits: Tensor,
    targets: TargetTokens,
    token_loss: Callable[[TrainerLogprobs], Tensor],
    memory: _Memory,
) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss, and its gradient by `logits` [n, V], which takes their memory."""
    chunk = _Chunk(logits, memory.outside[: len(logits)], targets)
    loss, by_sampled, by_top, by_tail = _differentiate(chunk.logprobs, token_loss)
    return loss, chunk.gradient(by_sampled, by_top, by_tail)


@dataclass(frozen=True)
class _Bins:
    """The probabilities, at temperature 1, of the top ids, and of all others together."""

    top: Tensor  # [n, k]
    tail: Tensor  # [n]
    faint: Tensor  # [n], where `tail` is too little to divide by


class _Chunk:
    """The logits [n, V] of one chunk, what the loss reads off them, and their gradient.

    The probabilities take the memory of the logits, and the gradient that of the probabilities.
    """

    def __init__(self, logits: Tensor, outside: Tensor, targets: TargetTokens) -> None:
        self._targets = targets
        self._probabilities = logits
        self._outside = outside
        parts = [self._read(at) for at in cached_rows(logits)]
        sampled, unscaled, entropy, *bins = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        top = tail = None
        if bins:
            top, tail, *probabilities = bins
            self._bins = _Bins(*probabilities)
        self.logprobs = TrainerLogprobs(sampled, unscaled, entropy, top, tail)

    def _read(self, at: slice) -> tuple[Tensor, ...]:
        """The logprobs of some rows, and what `_Bins` has of them; probabilities replace logits."""
        targets = self._targets.chunk(at)
        logits = self._probabilities[at]
        logprobs = logits.log_softmax(-1)
        scaled = logprobs
        if targets.temperatures is not None:
            scaled = (logits / targets.temperatures[:, None]).log_softmax(-1)
        probabilities = torch.exp(scaled, out=logits)
        read = (
            _pick(scaled, targets.ids),
            _pick(logprobs, targets.ids),
            -(probabilities * scaled).sum(-1),
        )
        if targets.top_ids is None:
            return read
        outside = self._outside[at]
        if targets.temperatures is not None:
            torch.exp(logprobs, out=outside)
        return *read, *_read_bins(logprobs, outside, targets.top_ids)

    def gradient(self, by_sampled: Tensor, by_top: Tensor | None, by_tail: Tensor | None) -> Tensor:
        """The loss's gradient by the logits [n, V], from its gradients by what was read off them.

        The gradient of a logprob is its one-hot less the probabilities. That of the tail is its own
        distribution less the probabilities. Every step is in place, so the order matters: the
        chunk's tensors are used up.
        """
        ids = self._targets.ids[:, None]
        temperatures = self._targets.temperatures
        if temperatures is not None:
            by_sampled = by_sampled / temperatures
        if by_top is None or by_tail is None:
            gradient = self._probabilities.mul_(-by_sampled[:, None])
        elif temperatures is None:
            gradient = self._gradient_of_bins(by_top, by_tail, by_sampled)
        else:
            gradient = self._probabilities.mul_(-by_sampled[:, None])
            gradient += self._gradient_of_bins(by_top, by_tail, torch.zeros_like(by_sampled))
        return gradient.scatter_add_(1, ids, by_sampled[:, None])

    def _gradient_of_bins(self, by_top: Tensor, by_tail: Tensor, by_other: Tensor) -> Tensor:
        """That of the bins, less `by_other` [n] times the probabilities.

        The tail's own distribution is the probabilities outside of the top ids over their sum.
        """
        assert self._targets.top_ids is not None
        bins = self._bins
        by_all = by_top.sum(-1) + by_tail + by_other
        by_outside = torch.where(bins.faint, by_tail, by_tail / bins.tail - by_all)
        gradient = self._outside.mul_(by_outside[:, None])
        # Written, not added: a row with fewer alternatives than others has the last one repeated.
        gradient.scatter_(1, self._targets.top_ids, bins.top * -by_all[:, None])
        return gradient.scatter_add_(1, self._targets.top_ids, by_top)


def _read_bins(logprobs: Tensor, outside: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Logprobs of the top ids [n, k] and of the tail [n], and what `_Bins` has of them.

    The tail is summed over its own tokens: one less the sum of the top ids would be nothing where
    the student is sure. Where the sum of the tail is nothing too, it is made of logprobs. `outside`
    holds the probabilities [n, V], and loses those of the top ids; where the tail is faint it holds
    the tail's own distribution instead.
    """
    top = outside.gather(1, ids)
    mass = outside.scatter_(1, ids, 0.0).sum(-1)
    tail = mass.log()
    faint = mass < FAINT
    rows = faint.nonzero()[:, 0]
    if len(rows):
        alone = logprobs[rows].scatter(1, ids[rows], float("-inf"))
        tail[rows] = alone.logsumexp(-1)
        outside[rows] = alone.softmax(-1)
    return logprobs.gather(1, ids), tail, top, mass, faint


def _add_weight_gradient(
    total: Tensor, grad_logits: Tensor, rounded: Tensor, hidden: Tensor
) -> None:
    """total [V, H] += grad_logits [n, V]ᵀ @ hidden [n, H], summed in float32.

    `rounded` is `grad_logits` in the precision of `hidden`. A product that came out in bfloat16
    would lose bits with each chunk. The branch for CUDA never ran on a GPU.
    """
    if hidden.is_cuda and hidden.dtype != total.dtype:
        total += torch.mm(rounded.t(), hidden, out_dtype=total.dtype)
    else:
        total.addmm_(grad_logits.to(total.dtype).t(), hidden.to(total.dtype))


def _pick(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids[:, None])[:, 0]


def _differentiate(
    logprobs: TrainerLogprobs, token_loss: Callable[[TrainerLogprobs], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The summed loss and its gradients by `sampled`, `top` and `tail`.

    These tensors are small, so autograd may do it.
    """
    leaves = [leaf for leaf in (logprobs.sampled, logprobs.top, logprobs.tail) if leaf is not None]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        loss = token_loss(logprobs).sum()
        by_sampled, *by_bins = torch.autograd.grad(
            loss, leaves, allow_unused=True, materialize_grads=True
        )
    by_top, by_tail = by_bins or (None, None)
    return loss.detach(), by_sampled, by_top, by_tail
