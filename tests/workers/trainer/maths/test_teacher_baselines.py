"""The baseline of the sampled teacher term: worked numbers, its expectation and its variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from onstream.workers.trainer.maths.scalars import teacher_baselines

STUDENT = torch.tensor([0.6, 0.3, 0.1])
TEACHER = torch.tensor([0.9, 0.09, 0.01])
REVERSE_KL = (STUDENT / TEACHER).log()
SCORES = torch.eye(3) - STUDENT
"""Of each token: the gradient of its logprob by the logits."""


Rollout = tuple[list[float], list[float]]


def tokens(*of: tuple[float, float]) -> Rollout:
    """A rollout of tokens with these probabilities and reverse KLs."""
    return [math.log(p) for p, _ in of], [math.log(p) - kl for p, kl in of]


def test_a_rollout_has_the_mean_of_the_others_weighed_by_what_the_student_was_unsure_of() -> None:
    even = [tokens((0.5, kl)) for kl in (1.0, 2.0, 6.0)]
    assert teacher_baselines(even) == pytest.approx([4.0, 3.5, 1.5], rel=1e-6)
    # (1 − p)²: .64 of the first, .25 and .01 of the two others
    uneven = [tokens((0.2, 3.0)), tokens((0.5, 1.0), (0.9, -2.0))]
    expected = [(0.25 * 1 + 0.01 * -2) / 0.26, 3.0]
    assert teacher_baselines(uneven) == pytest.approx(expected, rel=1e-5)


def test_a_clip_bounds_what_the_mean_is_of() -> None:
    rollouts = [tokens((0.5, 1.0)), tokens((0.5, 40.0)), tokens((0.5, -40.0))]
    assert teacher_baselines(rollouts, clip=5.0) == pytest.approx([0.0, -2.0, 3.0], abs=1e-5)


@pytest.mark.parametrize("others", [[], [tokens((1.0, 0.5))], [tokens()]])
def test_without_an_unsure_token_elsewhere_the_baseline_is_0(
    others: list[Rollout],
) -> None:
    assert teacher_baselines([tokens((0.5, 3.0)), *others])[0] == 0.0


def test_the_expected_gradient_is_that_without_a_baseline_over_all_that_can_be_sampled() -> None:
    """Two rollouts of a token each, with every pair of tokens weighed by its probability."""
    plain = torch.zeros(3)
    less_baseline = torch.zeros(3)
    for first in range(3):
        for second in range(3):
            rollouts = [sampled(token) for token in (first, second)]
            baselines = teacher_baselines(rollouts)
            chance = STUDENT[first] * STUDENT[second]
            for token, baseline in zip((first, second), baselines, strict=True):
                plain += chance * REVERSE_KL[token] * SCORES[token]
                less_baseline += chance * (REVERSE_KL[token] - baseline) * SCORES[token]
    exact = STUDENT * (REVERSE_KL - STUDENT @ REVERSE_KL)  # the gradient of KL(student ‖ teacher)
    torch.testing.assert_close(plain, 2 * exact)
    torch.testing.assert_close(less_baseline, 2 * exact)


def test_the_variance_of_the_gradient_falls() -> None:
    drawn = np.random.default_rng(0).choice(3, size=400, p=[0.6, 0.3, 0.1])
    [baseline, *_] = teacher_baselines([sampled(token) for token in drawn])
    assert variance(baseline) < 0.35 * variance(0.0)
    best = min(variance(value) for value in np.linspace(-1, 4, 501))
    assert variance(baseline) < 1.1 * best
    mean = float(STUDENT @ REVERSE_KL)
    assert variance(baseline) < 0.6 * variance(mean), "the plain mean lowers it less"


def sampled(token: int) -> Rollout:
    return tokens((float(STUDENT[token]), float(REVERSE_KL[token])))


def variance(baseline: float) -> float:
    """Of the gradient by the logits of one token, by enumeration."""
    gradients: Tensor = (REVERSE_KL - baseline)[:, None] * SCORES
    mean = STUDENT @ gradients
    return math.fsum((STUDENT * (gradients - mean).square().sum(-1)).tolist())
