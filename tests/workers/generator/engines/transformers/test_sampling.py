"""Draws and their logprobs, against numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onstream.workers.generator.engines.transformers.engine import draw, uniforms

PROBS = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def test_a_draw_depends_on_its_own_seed_and_position_alone() -> None:
    together = uniforms([5, 7, 9], [0, 3, 1])
    assert uniforms([7], [3])[0] == together[1]
    assert len({*together, *uniforms([7, 7], [2, 4])}) == 5


def test_draws_are_spread_evenly_over_seeds_and_over_positions() -> None:
    by_seed = uniforms(np.arange(20_000), np.zeros(20_000))
    by_position = uniforms(np.full(20_000, 123), np.arange(20_000))
    for draws in (by_seed, by_position):
        counts = np.histogram(draws, bins=20, range=(0, 1))[0]
        assert (
            (counts - 1000) ** 2 / 1000
        ).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_a_token_is_drawn_where_the_cumulative_probability_passes_the_draw() -> None:
    ids, logprobs = draw(
        PROBS.log().repeat(5, 1), [1.0] * 5, np.array([0.0, 0.39, 0.41, 0.89, 0.9999999])
    )
    assert ids.tolist() == [0, 0, 1, 2, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.4, 0.4, 0.3, 0.2, 0.1])


def test_the_largest_draw_never_falls_past_the_last_token_that_can_be_drawn() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    ids, _ = draw(logits, [1.0], np.array([1 - 2.0**-52]))
    assert ids.tolist() == [1]


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 70_001])
def test_a_draw_is_that_of_the_whole_cumulative_sum_in_float64(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, vocabulary, generator=generator)
    random = np.random.default_rng(0).random(500)
    ids, _ = draw(logits.repeat(500, 1), [1.0] * 500, random)
    cdf = logits[0].double().softmax(-1).cumsum(-1).numpy()
    wanted = np.searchsorted(cdf, random, side="right")
    differ = ids.numpy() != wanted
    # Only where the draw is so near to the end of a token that float32's logprobs decide.
    assert np.abs(cdf[ids.numpy()[differ]] - random[differ]).max(initial=0) < 1e-6
    assert differ.mean() < 0.01
    assert len(set(ids.tolist())) > 20


def test_the_logprob_of_a_draw_is_at_the_sampling_temperature() -> None:
    _, logprobs = draw(PROBS.log(), [0.5], np.array([0.0]))
    assert logprobs.exp().tolist() == pytest.approx([0.16 / 0.30])


def test_temperature_zero_takes_the_likeliest_token_and_reports_the_models_own_logprob() -> None:
    ids, logprobs = draw(PROBS.log(), [0], np.array([0.95]))
    assert ids.tolist() == [0]
    assert logprobs.exp().tolist() == pytest.approx([0.4])


def test_rows_of_several_temperatures_share_a_batch() -> None:
    ids, logprobs = draw(
        PROBS.log().repeat(3, 1),
        [0.5, 1.0, 0],
        np.array([0.95, 0.95, 0.95]),
    )
    assert ids.tolist() == [2, 3, 0]
    assert logprobs.exp().tolist() == pytest.approx([0.04 / 0.30, 0.1, 0.4])


def test_the_logprob_of_a_rare_token_is_exact_beside_one_that_is_far_likelier() -> None:
    logits = torch.full((1, 70_000), -30.0)
    logits[0, 41_000] = 4.0
    ids, logprobs = draw(logits, [1.0], np.array([2.0**-52]))
    assert ids.tolist() == [0]
    assert logprobs.item() == pytest.approx(logits.double().log_softmax(-1)[0, 0].item(), abs=1e-6)


def test_logits_that_are_not_numbers_are_an_error_and_no_token() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(torch.tensor([[0.0, torch.nan]]), [1.0], np.array([0.5]))
