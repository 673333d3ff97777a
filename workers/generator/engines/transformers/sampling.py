"""Drawing tokens from logits, with seeds that no neighbour disturbs.

Pure functions of tensors. n rows, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))


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
