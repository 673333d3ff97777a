"""The formulas on numbers worked by hand: the example of docs/objective.md, and limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from onstream.workers.trainer.maths.loss import (
    PolicyTerms,
    TrustRegion,
    keep_mask,
    negative_log_likelihood,
    policy_loss,
    reverse_kl,
    reverse_kl_k3,
    tail_from_top,
    top_k_reverse_kl,
)

TRAINER = torch.tensor([-0.5, -1.0, -2.0, -0.1])
GENERATOR = torch.tensor([-0.6, -1.0, -1.0, -0.9])
TEACHER = torch.tensor([-0.2, -1.5, -0.5, -0.1])
COEFFICIENTS: dict[str, Any] = {
    "kl_tau": 1e-3,
    "trust_low": 0.2,
    "trust_high": 0.2,
    "max_log_ratio": 20.0,
}


def terms(
    *,
    advantage: float = 0.0,
    adv_tau: float = 1.0,
    teacher_tau: float = 0.0,
    teacher: Tensor = TEACHER,
    trainer: Tensor = TRAINER,
    generator: Tensor = GENERATOR,
    trust_region: TrustRegion = "signed",
    **coefficients: float,
) -> PolicyTerms:
    rewards = torch.full_like(trainer, adv_tau * advantage)
    judged = -teacher_tau * reverse_kl(trainer.detach(), teacher)
    return policy_loss(
        trainer,
        generator,
        rewards,
        judged,
        trust_region=trust_region,
        **{**COEFFICIENTS, **coefficients},
    )


def whole(found: PolicyTerms) -> Tensor:
    """The policy loss of each token."""
    return found.reward + found.teacher + found.drift


def gradient(**case: Any) -> Tensor:
    trainer = TRAINER.clone().requires_grad_()
    whole(terms(trainer=trainer, **case)).sum().backward()
    assert trainer.grad is not None
    return trainer.grad


@pytest.mark.parametrize(
    ("trust_region", "advantage", "adv_tau", "teacher_tau", "loss"),
    [
        ("signed", 1.0, 1.0, 0.5, -2.663086),
        ("signed", 0.0, 1.0, 0.5, -0.190035),
        ("symmetric", 1.0, 1.0, 0.5, -2.019297),
        ("symmetric", 0.0, 1.0, 0.5, 0.085874),
        ("symmetric", 1.0, 0.0, 1.0, 0.170099),
        ("symmetric", -7.0, 0.0, 1.0, 0.170099),
    ],
)
def test_the_summed_loss_is_the_worked_number(
    trust_region: TrustRegion, advantage: float, adv_tau: float, teacher_tau: float, loss: float
) -> None:
    found = terms(
        trust_region=trust_region, advantage=advantage, adv_tau=adv_tau, teacher_tau=teacher_tau
    )
    assert whole(found).sum().item() == pytest.approx(loss, abs=2e-6)


def test_signed_drops_a_risen_token_only_when_it_would_be_pushed_further_up() -> None:
    assert terms(advantage=1.0, teacher_tau=0.5).keep.tolist() == [1, 1, 1, 0]
    assert terms(advantage=-1.0).keep.tolist() == [1, 1, 0, 1]


def test_symmetric_drops_tokens_2_and_3_whatever_the_sign_and_none_drops_nothing() -> None:
    for advantage in (1.0, -1.0):
        assert terms(advantage=advantage, trust_region="symmetric").keep.tolist() == [1, 1, 0, 0]
        assert terms(advantage=advantage, trust_region="none").keep.tolist() == [1, 1, 1, 1]


def test_the_bounds_are_probabilities_each_for_its_own_side() -> None:
    ones = torch.ones(1)
    risen = keep_mask(
        ones,
        torch.tensor([0.8]).log(),
        torch.tensor([0.5]).log(),
        trust_region="signed",
        low=0.0,
        high=0.31,
    )
    fallen = keep_mask(
        -ones,
        torch.tensor([0.5]).log(),
        torch.tensor([0.8]).log(),
        trust_region="signed",
        low=0.29,
        high=9.0,
    )
    assert (risen.item(), fallen.item()) == (1.0, 0.0)


def test_reverse_kl_is_positive_where_the_student_is_surer_than_the_teacher() -> None:
    torch.testing.assert_close(reverse_kl(TRAINER, TEACHER), torch.tensor([-0.3, 0.5, -1.5, 0.0]))
    assert reverse_kl(TRAINER, TEACHER).mean().item() == pytest.approx(-0.325)


def test_a_clip_bounds_the_reverse_kl_on_both_sides() -> None:
    torch.testing.assert_close(
        reverse_kl(TRAINER, TEACHER, 0.4), torch.tensor([-0.3, 0.4, -0.4, 0.0])
    )


def test_the_low_variance_estimate_is_never_negative_and_zero_when_equal() -> None:
    log_ratio = TRAINER - GENERATOR
    assert (log_ratio.exp() - log_ratio - 1).mean().item() == pytest.approx(0.199648, abs=1e-6)
    torch.testing.assert_close(reverse_kl_k3(-log_ratio), log_ratio.exp() - log_ratio - 1)
    assert reverse_kl_k3(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_parts_are_the_reward_the_teacher_and_the_drift() -> None:
    found = terms(advantage=1.0, teacher_tau=0.5)
    ratio = (TRAINER - GENERATOR).exp()
    keep = torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(found.reward, -keep * ratio)
    torch.testing.assert_close(found.teacher, keep * ratio * 0.5 * (TRAINER - TEACHER))
    torch.testing.assert_close(found.drift, 1e-3 * (TRAINER - GENERATOR) ** 2)
    assert found.drift[3] > 0, "the drift counts for a dropped token too"


def test_the_gradient_is_that_of_the_ratio_times_a_constant_advantage() -> None:
    ratio = (TRAINER - GENERATOR).exp()
    keep = torch.tensor([1.0, 1.0, 1.0, 0.0])
    advantage = 1.0 - 0.5 * (TRAINER - TEACHER)
    expected = -keep * ratio * advantage + 2e-3 * (TRAINER - GENERATOR)
    torch.testing.assert_close(gradient(advantage=1.0, teacher_tau=0.5), expected)


def test_a_teacher_equal_to_the_trainer_gives_the_gradient_of_no_teacher() -> None:
    torch.testing.assert_close(
        gradient(advantage=0.3, teacher_tau=0.7, teacher=TRAINER),
        gradient(advantage=0.3),
        rtol=0,
        atol=1e-6,
    )


def test_without_adv_tau_the_gradient_does_not_depend_on_the_reward() -> None:
    case = {"adv_tau": 0.0, "teacher_tau": 1.0}
    torch.testing.assert_close(
        gradient(advantage=5.0, **case), gradient(advantage=-5.0, **case), rtol=0, atol=1e-6
    )


def test_with_teacher_tau_the_gradient_depends_on_the_teacher() -> None:
    case = {"advantage": 1.0, "teacher_tau": 1.0, "trust_region": "none"}
    moved = (gradient(**case) - gradient(**case, teacher=TEACHER - 1.0)).abs()
    assert (moved > 0.1).all()


def test_the_ratio_is_bounded_before_masking_so_that_nothing_becomes_nan() -> None:
    trainer = torch.tensor([-0.1, -0.1]).requires_grad_()
    generator = torch.tensor([-500.0, -500.0])
    found = policy_loss(
        trainer, generator, torch.ones(2), torch.zeros(2), trust_region="signed", **COEFFICIENTS
    )
    assert found.keep.tolist() == [0, 0]
    assert found.ratio.tolist() == pytest.approx([math.exp(20)] * 2)
    whole(found).sum().backward()
    assert trainer.grad is not None and trainer.grad.isfinite().all()


def test_the_bound_of_the_ratio_is_an_argument() -> None:
    assert terms(advantage=1.0, max_log_ratio=0.5).ratio.max().item() == pytest.approx(
        math.exp(0.5)
    )


def test_supervised_loss_is_masked_negative_log_likelihood() -> None:
    kept = torch.tensor([-0.1, -0.5, -0.2])[torch.tensor([1, 0, 1], dtype=torch.bool)]
    assert negative_log_likelihood(kept).sum().item() == pytest.approx(0.3)


def test_the_top_k_term_on_two_tokens_and_a_tail() -> None:
    student = torch.tensor([[0.5, 0.2]]).log()
    teacher = torch.tensor([[0.7, 0.2]]).log()
    found = top_k_reverse_kl(student, torch.tensor([0.3]).log(), teacher, torch.tensor([0.1]).log())
    assert found.item() == pytest.approx(
        0.5 * math.log(0.5 / 0.7) + 0.2 * math.log(0.2 / 0.2) + 0.3 * math.log(0.3 / 0.1)
    )


def test_the_top_k_term_of_equal_models_is_zero_with_no_gradient_in_the_logits() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs = logits.log_softmax(-1)
    top = logprobs[:, :2]
    tail = logprobs[:, 2:].logsumexp(-1)
    found = top_k_reverse_kl(top, tail, top.detach(), tail.detach())
    found.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(found.detach(), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(3, 6), rtol=0, atol=1e-6)


def test_pushing_mass_out_of_the_top_k_does_not_shrink_the_term() -> None:
    teacher = torch.tensor([[0.6, 0.3]]).log()
    tail = torch.tensor([0.1]).log()
    found = []
    for share in (0.1, 0.3, 0.6, 0.9):
        student = torch.tensor([[0.6, 0.3]]).mul((1 - share) / 0.9).log()
        student_tail = torch.tensor([share]).log()
        found.append(top_k_reverse_kl(student, student_tail, teacher, tail).item())
    assert found == sorted(found) and found[0] == pytest.approx(0, abs=1e-6) and found[-1] > 1


def test_a_tail_computed_from_the_top_k_is_floored_where_rounding_ate_it() -> None:
    tail, floored = tail_from_top(torch.tensor([[0.7, 0.2], [0.9, 0.1]]).log(), 1e-6)
    assert tail.tolist() == pytest.approx([math.log(0.1), math.log(1e-6)], rel=1e-4)
    assert floored.tolist() == [0, 1]
