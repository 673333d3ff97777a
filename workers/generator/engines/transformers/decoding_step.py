"""One decoding step: which tokens go into the forward pass, and which are drawn from its logits.

Drawing is pure functions of tensors, with seeds that no neighbour disturbs. There, n is rows and V
the tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onstream.pipeline.images import PromptImage
from onstream.workers.generator.engines.transformers.sequence import (
    Integers,
    PromptKey,
    SequenceState,
)
from onstream.workers.generator.engines.transformers.slot_cache import (
    ContinuationBlock,
    ForwardPass,
    PromptBlock,
    SlotCache,
)

# SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class StepInput:
    """One packed row of T tokens for a forward pass over n slots.

    Args:
        input_ids: [1, T].
        position_ids: [1, T], or [3, 1, T] where a token of the row has a place in space.
        last: [n], the index of the token after which each slot's next token is drawn.
        forward_pass: what attention needs.
        images: those of the row's prompts, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    last: Tensor
    forward_pass: ForwardPass
    images: list[PromptImage]


class RowPacker:
    """Gathers the parts of a packed row, in order, on the model's device."""

    def __init__(self, cache: SlotCache, device: torch.device, dtype: torch.dtype) -> None:
        self._pass = ForwardPass(cache)
        self._device = device
        self._dtype = dtype
        self._ids: list[Integers] = []
        self._positions: list[Integers] = []  # [t] or [3, t] each
        self._images: list[PromptImage] = []
        self._tokens = 0

    def prompts(self, rows: Sequence[SequenceState], first: int) -> Integers:
        """Add each distinct prompt of `rows` once.

        The rows take the slots from `first` on. Returns the index of the last token for each row.
        """
        numbers: dict[PromptKey, int] = {}
        source = [numbers.setdefault(row.prompt, len(numbers)) for row in rows]
        distinct = list({row.prompt: row for row in rows}.values())
        ids = [row.request.prompt_ids for row in distinct]
        sizes = np.array([len(prompt) for prompt in ids])
        longest = int(sizes.max())
        offsets = _ramps(np.zeros_like(sizes), sizes)
        grid_rows = np.repeat(np.arange(len(sizes)), sizes)
        self._pass.prompts = PromptBlock(
            tokens=int(sizes.sum()),
            count=len(distinct),
            longest=longest,
            cells=self._index(offsets + grid_rows * longest),
            first=first,
            last=first + len(rows),
            source=self._index(source),
        )
        self._add(np.concatenate(ids), _prompt_positions(distinct, offsets))
        self._images += [image for row in distinct for image in row.request.images]
        return np.cumsum(sizes)[source] - 1

    def continuations(self, rows: Sequence[SequenceState], first: int, *, whole: bool) -> Integers:
        """Add the last token of each of `rows`, or with `whole` its whole completion.

        The rows are in the slots from `first` on. Returns the index of the last token for each.
        """
        ids = [row.token_ids if whole else row.token_ids[-1:] for row in rows]
        sizes = np.array([len(tokens) for tokens in ids])
        lengths = np.array([row.length for row in rows])
        longest = int(sizes.max())
        most = int(lengths.max())
        positions = _ramps(lengths - sizes, sizes)
        begin = self._tokens
        shifts = np.repeat([row.shift for row in rows], sizes)
        self._add(np.concatenate(ids), positions + shifts)
        cells = _ramps(np.arange(len(rows)) * longest, sizes)
        queries = np.full(len(rows) * longest, most)
        queries[cells] = positions
        block = ContinuationBlock(
            begin=begin,
            end=self._tokens,
            first=first,
            last=first + len(rows),
            longest=longest,
            slots=self._index(first + np.repeat(np.arange(len(rows)), sizes)),
            positions=self._index(positions),
            cells=None if longest == 1 else self._index(cells),
            bias=self._bias(queries.reshape(len(rows), longest), most),
        )
        self._pass.continuations.append(block)
        return begin + np.cumsum(sizes) - 1

    def step_input(self, last: Sequence[Integers]) -> StepInput:
        """The packed row.

        `last` is what `prompts` and `continuations` returned, in the order of the slots.
        """
        return StepInput(
            input_ids=self._index(np.concatenate(self._ids))[None],
            position_ids=self._index(_joined_positions(self._positions)),
            last=self._index(np.concatenate(last)),
            forward_pass=self._pass,
            images=self._images,
        )

    def _add(self, ids: Integers, positions: Integers) -> None:
        self._ids.append(ids)
        self._positions.append(positions)
        self._tokens += len(ids)

    def _index(self, values: Sequence[int] | Integers) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._device)

    def _bias(self, queries: Integers, length: int) -> Tensor:
        """[rows, M, L]: 0 up to and including each query's own position, −inf after it."""
        hidden = torch.arange(length, device=self._device) > self._index(queries)[..., None]
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(hidden, -torch.inf)


def step_input(
    cache: SlotCache,
    rows: Sequence[SequenceState],
    cached: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> StepInput:
    """The pass that brings every slot to where its next token can be drawn.

    Args:
        cache: of keys and values; it is made to have room for `rows`.
        rows: what runs in slots 0 … n−1. The first `cached` are in the cache except for their last
            token. The others are not in it at all; of those, the ones with a completion come first.
        cached: how many rows the cache has.
        device: the model's.
        dtype: the model's.
    """
    cache.reserve(max(row.length for row in rows))
    # Rows cached … restarted−1 run again after new weights: prompt and completion are recomputed.
    restarted = cached + sum(bool(row.token_ids) for row in rows[cached:])
    packer = RowPacker(cache, device, dtype)
    new_last: Integers = np.empty(0, np.int32)
    if cached < len(rows):
        new_last = packer.prompts(rows[cached:], cached)[restarted - cached :]
    last = []
    if cached:
        last.append(packer.continuations(rows[:cached], 0, whole=False))
    if restarted > cached:
        last.append(packer.continuations(rows[cached:restarted], cached, whole=True))
    return packer.step_input([*last, new_last])


def uniforms(seeds: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Draws in [0, 1), one for each (seed, position) pair.

    A hash rather than a random generator: there is no state that rows could share.

    Args:
        seeds: uint64 [n], the rollouts' seeds.
        positions: [n], the index of the token to draw in its completion.
    """
    stream = _mixed(np.asarray(seeds, dtype=np.uint64) + _INCREMENT)
    bits = _mixed(stream + np.asarray(positions, dtype=np.uint64) * _INCREMENT)
    # 52 bits, so that u·total stays below total in float64 and never falls past the last token.
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(
    logits: Tensor, temperatures: Sequence[float], uniform: npt.NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its logprob under the distribution it was drawn from.

    Args:
        logits: [n, V], any float type; computed in float32.
        temperatures: [n]; 0 takes the likeliest token, and gives its logprob at temperature 1.
        uniform: [n] draws in [0, 1).

    Returns:
        Token ids int64 [n] and logprobs float32 [n], in nats.

    Raises:
        FloatingPointError: a row's logits are not numbers: broken weights, or an overflow.
    """
    greedy = [temperature == 0 for temperature in temperatures]
    divisors = [temperature or 1.0 for temperature in temperatures]
    divisor = torch.tensor(divisors, dtype=torch.float32, device=logits.device)
    logprobs = (logits.float() / divisor[:, None]).log_softmax(dim=-1)
    # Summed in float64: over a vocabulary of 150k tokens a float32 sum is off by more than the
    # probability of its rare tokens.
    cdf = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    if not cdf[:, -1].isfinite().all():
        raise FloatingPointError(
            "the model's logits are not finite; "
            "its weights are broken, or overflow at this precision"
        )
    target = torch.from_numpy(uniform).to(logits.device)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True)[:, 0]
    if any(greedy):
        ids = torch.where(torch.tensor(greedy, device=logits.device), logprobs.argmax(dim=-1), ids)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))


def _prompt_positions(rows: Sequence[SequenceState], offsets: Integers) -> Integers:
    """Positions of the prompts of `rows`: `offsets` [t], or [3, t] where one is in space."""
    if all(row.space is None for row in rows):
        return offsets
    positions = []
    for row in rows:
        count = len(row.request.prompt_ids)
        positions.append(_in_space(np.arange(count)) if row.space is None else row.space)
    return np.concatenate(positions, axis=1)


def _joined_positions(positions: Sequence[Integers]) -> Integers:
    """[t] and [3, t] arrays as one: [1, T], or [3, 1, T] where one of them is in space."""
    if all(some.ndim == 1 for some in positions):
        return np.concatenate(positions)[None]
    return np.concatenate([_in_space(some) for some in positions], axis=1)[:, None]


def _in_space(positions: Integers) -> Integers:
    """[t] or [3, t] as [3, t]: text has the same position in time, height and width."""
    return np.broadcast_to(positions, (3, positions.shape[-1]))


def _ramps(starts: Integers, sizes: Integers) -> Integers:
    """For each start and size the numbers start, start + 1, … of that size, one after the other.

    [2, 7] and [3, 1] give [2, 3, 4, 7].
    """
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ramps: Integers = np.repeat(starts, sizes) + within
    return ramps
