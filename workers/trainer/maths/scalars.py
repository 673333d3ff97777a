"""The formulas on plain numbers: a rollout's advantage and staleness, a step's learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev
from typing import Final, Literal, Protocol

UNWRITTEN: Final = -1
"""The staleness of a token that no policy wrote."""
LEAST_WEIGHT: Final = 1e-6
"""Below it the tokens of a step say nothing about its baseline: the student is sure of all."""


def group_advantages(rewards: Sequence[float | None], *, normalize: bool = False) -> list[float]:
    """Each reward less the group's mean reward, [G] -> [G]; 0 where there is no reward.

    A group of one, or of equal rewards, has advantages of 0. With `normalize` they are divided by
    the population standard deviation (GRPO, arXiv:2402.03300). Without it, groups whose rewards
    differ more weigh more (Dr. GRPO, arXiv:2503.20783).

    Example: [1, 0, None, 0.5] -> [0.5, -0.5, 0, 0].
    """
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2 or min(known) == max(known):
        return [0.0] * len(rewards)
    mean = fmean(known)
    scale = pstdev(known) if normalize else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def teacher_baselines(
    logprobs: Sequence[tuple[Sequence[float], Sequence[float]]], clip: float | None = None
) -> list[float]:
    """For each of R rollouts: the weighted mean of the sampled reverse KL of the others, in nats.

    `logprobs` has the generator's [C] and the teacher's [C] of each rollout's C tokens. A token of
    probability p has the reverse KL generator − teacher, within ± `clip`, and the weight (1 − p)².
    0 where there are no others, or the student was sure of all their tokens.

    Taken off the reverse KL of a rollout's own tokens it leaves the expected gradient as it is,
    since it does not depend on what was sampled there. The weights are near the squared gradient of
    a token's logprob by the logits, which is between (1 − p)² and twice that: with these the mean
    is the constant that lowers the variance most (Greensmith et al., "Variance Reduction Techniques
    for Gradient Estimates in Reinforcement Learning", 2004).

    Example: of one token each, with p = 1/2 and a reverse KL of 1, 2 and 6 -> [4, 3.5, 1.5].
    """
    bound = math.inf if clip is None else clip
    sums = [_weighted_sums(*own, bound) for own in logprobs]
    all_weighted = sum(weighted for weighted, _ in sums)
    all_weights = sum(weights for _, weights in sums)
    baselines = []
    for weighted, weights in sums:
        others = all_weights - weights
        baselines.append((all_weighted - weighted) / others if others > LEAST_WEIGHT else 0.0)
    return baselines


def _weighted_sums(
    generator: Sequence[float], teacher: Sequence[float], bound: float
) -> tuple[float, float]:
    """The sum of weight · reverse KL over C tokens, and that of the weights."""
    weighted = 0.0
    total = 0.0
    for own, judged in zip(generator, teacher, strict=True):
        weight = math.expm1(own) ** 2
        weighted += weight * max(-bound, min(bound, own - judged))
        total += weight
    return weighted, total


class Span(Protocol):
    """The completion tokens from `start` up to `end`, written by policy `version`."""

    @property
    def version(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


def staleness(oldest: int | None, version: int) -> int:
    """`version`, whose weights take the step, less the oldest version that wrote. In steps, ≥ 0.

    Tokens that no policy wrote, such as an answer from elsewhere, count as 0. So do tokens of a
    newer version: a run that is resumed from an older checkpoint than its last announced version
    meets them.
    """
    if oldest is None:
        return 0
    return max(0, version - oldest)


def token_staleness(spans: Iterable[Span], tokens: int, version: int) -> list[int]:
    """The staleness of each of `tokens` completion tokens in the step that `version` takes.

    It is `UNWRITTEN` outside all spans.
    """
    ages = [UNWRITTEN] * tokens
    for span in spans:
        age = staleness(span.version, version)
        for place in range(span.start, min(span.end, tokens)):
            ages[place] = age
    return ages


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    max_steps: int,
    schedule: Literal["constant", "linear", "cosine"],
    min_ratio: float,
) -> float:
    """The learning rate of `step`, counted from 1. A resumed run needs no scheduler state.

    It rises linearly over `warmup` steps to `peak`, then stays or falls to `min_ratio` · peak. Step
    `max_steps` has the lowest rate, and later ones keep it.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    share = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (min_ratio + (1 - min_ratio) * share)
