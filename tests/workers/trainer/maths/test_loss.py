"""The formulas on numbers worked by hand: the example of docs/objective.md, and limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from onstream.workers.trainer.maths.loss import (
    Divergence,
    LossInputs,
    PolicyTerms,
    TrustRegion,
    divergence,
    keep_mask,
    negative_log_likelihood,
    policy_loss,
    reverse_kl,
    reverse_kl_k3,
    rl_loss,
    tail_from_top,
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


KINDS: tuple[Divergence, ...] = ("reverse", "forward", "jsd")


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        # by hand, s = (.5, .2, .3) and t = (.7, .2, .1)
        ("reverse", 0.5, 0.5 * math.log(0.5 / 0.7) + 0.3 * math.log(0.3 / 0.1)),
        ("forward", 0.5, 0.7 * math.log(0.7 / 0.5) + 0.1 * math.log(0.1 / 0.3)),
        (  # the mixture is (.6, .2, .2)
            "jsd",
            0.5,
            0.5 * (0.7 * math.log(0.7 / 0.6) + 0.1 * math.log(0.1 / 0.2))
            + 0.5 * (0.5 * math.log(0.5 / 0.6) + 0.3 * math.log(0.3 / 0.2)),
        ),
        (  # the mixture is (.55, .2, .25)
            "jsd",
            0.25,
            0.25 * (0.7 * math.log(0.7 / 0.55) + 0.1 * math.log(0.1 / 0.25))
            + 0.75 * (0.5 * math.log(0.5 / 0.55) + 0.3 * math.log(0.3 / 0.25)),
        ),
    ],
)
def test_the_divergence_on_two_tokens_and_a_tail(
    kind: Divergence, beta: float, expected: float
) -> None:
    student = torch.tensor([[0.5, 0.2, 0.3]]).log()
    teacher = torch.tensor([[0.7, 0.2, 0.1]]).log()
    found = divergence(student, teacher, kind=kind, beta=beta)
    assert found.item() == pytest.approx(expected, abs=1e-7)


def probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_gradient_of_a_divergence_is_that_of_its_definition(
    kind: Divergence, beta: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    ours = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    divergence(ours.log_softmax(-1), teacher.log_softmax(-1), kind=kind, beta=beta).sum().backward()
    s = probabilities(plain)
    t = probabilities(teacher)
    m = beta * t + (1 - beta) * s
    defined = {
        "reverse": kl(s, t),
        "forward": kl(t, s),
        "jsd": beta * kl(t, m) + (1 - beta) * kl(s, m),
    }
    defined[kind].backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-12)


def test_jsd_acts_as_the_forward_kl_near_0_and_as_the_reverse_near_1() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    given = (student.log_softmax(-1), teacher.log_softmax(-1))
    near = 1e-6
    for kind, beta in (("forward", near), ("reverse", 1 - near)):
        limit = divergence(*given, kind="jsd", beta=beta) / near
        plain = divergence(*given, kind=kind, beta=0.5)  # type: ignore[arg-type]
        torch.testing.assert_close(limit, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_equal_models_is_zero_with_no_gradient_in_the_logits(
    kind: Divergence,
) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs = logits.log_softmax(-1)
    bins = torch.cat((logprobs[:, :2], logprobs[:, 2:].logsumexp(-1)[:, None]), dim=1)
    found = divergence(bins, bins.detach(), kind=kind, beta=0.5)
    found.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(found.detach(), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(3, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pushing_mass_out_of_the_top_k_does_not_shrink_the_term(kind: Divergence) -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.1]]).log()
    found = []
    for share in (0.1, 0.3, 0.6, 0.9):
        student = torch.tensor([[0.6, 0.3]]).mul((1 - share) / 0.9)
        bins = torch.cat((student, torch.tensor([[share]])), dim=1).log()
        found.append(divergence(bins, teacher, kind=kind, beta=0.5).item())
    assert found == sorted(found) and found[0] == pytest.approx(0, abs=1e-6)
    assert found[-1] > {"reverse": 1, "forward": 1, "jsd": 0.3}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_surely_wrong_has_a_finite_term_and_gradient(kind: Divergence) -> None:
    logits = torch.tensor([[60.0, -60.0, -60.0]]).requires_grad_()
    teacher = torch.tensor([[-60.0, 60.0, -60.0]]).log_softmax(-1)
    divergence(logits.log_softmax(-1), teacher, kind=kind, beta=0.5).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def doubled_teacher_term(inputs: LossInputs, kind: Divergence) -> torch.Tensor:
    """What the teacher alone adds to each token's loss, at a `teacher_tau` of 2."""
    value = rl_loss(
        inputs,
        teacher_tau=2.0,
        teacher_divergence=kind,
        teacher_jsd_beta=0.25,
        adv_tau=0.0,
        reverse_kl_clip=None,
        trust_region="none",
        **COEFFICIENTS,
    )
    return value.means["loss_teacher"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rl_loss_takes_the_divergence_that_is_asked_for(kind: Divergence) -> None:
    student = torch.tensor([[0.5, 0.2, 0.3]]).log()
    teacher = torch.tensor([[0.7, 0.2, 0.1]]).log()
    one = torch.zeros(1)
    inputs = LossInputs(
        token_ids=torch.zeros(1, dtype=torch.int64),
        trainer_logprobs=one,
        trainer_logprobs_unscaled=one,
        entropy=one,
        advantage=one,
        generator_logprobs=one,
        teacher_logprobs=one,
        teacher_top_logprobs=teacher[:, :2],
        teacher_tail_logprobs=teacher[:, 2],
        trainer_top_logprobs=student[:, :2],
        trainer_tail_logprobs=student[:, 2],
    )
    found = doubled_teacher_term(inputs, kind)
    expected = 2 * divergence(student, teacher, kind=kind, beta=0.25)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_with_fewer_alternatives_are_each_trained_with_their_own(kind: Divergence) -> None:
    """Three tokens, of which the teacher gave 2, 1 and none of its likeliest."""
    student = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.2, 0.5], [0.5, 0.2, 0.3]]).log()
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.7, math.nan, 0.3], [math.nan] * 3]).log()
    leaves = [student[:, :2].clone().requires_grad_(), student[:, 2].clone().requires_grad_()]
    sampled = torch.tensor([-0.5, -1.0, -2.0]).requires_grad_()
    inputs = LossInputs(
        token_ids=torch.zeros(3, dtype=torch.int64),
        trainer_logprobs=sampled,
        trainer_logprobs_unscaled=sampled.detach(),
        entropy=torch.zeros(3),
        advantage=torch.zeros(3),
        generator_logprobs=sampled.detach(),
        teacher_logprobs=torch.tensor([-0.2, -1.5, -0.5]),
        teacher_baseline=torch.tensor([9.0, 9.0, -0.5]),
        teacher_top_logprobs=teacher[:, :2],
        teacher_tail_logprobs=teacher[:, 2],
        trainer_top_logprobs=leaves[0],
        trainer_tail_logprobs=leaves[1],
    )
    values = doubled_teacher_term(inputs, kind)
    bins = [student[:1], student[1:2, [0, 2]]], [teacher[:1], teacher[1:2, [0, 2]]]
    expected = [
        2 * divergence(ours, theirs, kind=kind, beta=0.25).item()
        for ours, theirs in zip(*bins, strict=True)
    ]
    # −ratio · advantage, with 2 · −((−2 − −.5) − −.5) = 2 as the advantage
    assert values.tolist() == pytest.approx([*expected, -2.0], rel=1e-5)
    values.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert leaves[0].grad is not None and leaves[1].grad is not None and sampled.grad is not None
    assert leaves[0].grad[1, 1] == 0.0 and leaves[0].grad[2].abs().sum() == 0.0
    assert leaves[1].grad[2] == 0.0
    assert sampled.grad.tolist() == [0.0, 0.0, -2.0]


def test_a_tail_computed_from_the_top_k_is_floored_where_rounding_ate_it() -> None:
    tail, floored = tail_from_top(torch.tensor([[0.7, 0.2], [0.9, 0.1]]).log(), 1e-6)
    assert tail.tolist() == pytest.approx([math.log(0.1), math.log(1e-6)], rel=1e-4)
    assert floored.tolist() == [0, 1]
    tail, _ = tail_from_top(torch.tensor([[0.7, math.nan]]).log(), 1e-6)
    assert tail.tolist() == pytest.approx([math.log(0.3)], rel=1e-4)
