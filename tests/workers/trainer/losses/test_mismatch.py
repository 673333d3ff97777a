"""How far the two sets of logprobs are apart, by who wrote the token, in hand-worked numbers."""

from __future__ import annotations

import pytest
import torch

from onstream.workers.trainer.losses.row_loss import MismatchTally, mismatch_metrics


def test_tokens_are_told_apart_by_their_staleness_over_all_rows() -> None:
    tally = MismatchTally()
    tally.add(torch.tensor([0.25, 1.0, 0.5, 9.0]), torch.tensor([0, 2, 0, -1]), ages=(0, 2))
    tally.add(torch.tensor([0.75, 3.0]), torch.tensor([0, 1]), ages=(0, 1))
    assert tally.result() == {
        0: {"mean": 0.5, "max": 0.75, "tokens": 3},
        1: {"mean": 3.0, "max": 3.0, "tokens": 1},
        2: {"mean": 1.0, "max": 1.0, "tokens": 1},
    }


def test_a_staleness_that_is_in_the_row_and_not_in_the_chunk_is_left_out() -> None:
    tally = MismatchTally()
    tally.add(torch.tensor([0.5]), torch.tensor([1]), ages=(0, 1))
    assert list(tally.result()) == [1]


def test_the_metrics_name_what_the_weights_of_the_step_wrote_themselves() -> None:
    fresh = {"mean": 0.5, "max": 0.75, "tokens": 3}
    stale = {"mean": 3.0, "max": 4.0, "tokens": 2}
    assert mismatch_metrics({0: fresh, 1: stale}) == {  # type: ignore[dict-item]
        "mismatch_fresh_mean": 0.5,
        "mismatch_fresh_max": 0.75,
        "mismatch_by_staleness": {"0": fresh, "1": stale},
    }


@pytest.mark.parametrize(
    ("found", "by_staleness"), [({}, None), ({2: {"mean": 1.0, "max": 1.0, "tokens": 1}}, ["2"])]
)
def test_without_a_token_of_its_own_a_step_has_no_fresh_mismatch(
    found: dict[int, object], by_staleness: list[str] | None
) -> None:
    metrics = mismatch_metrics(found)  # type: ignore[arg-type]
    assert (metrics["mismatch_fresh_mean"], metrics["mismatch_fresh_max"]) == (None, None)
    assert metrics["mismatch_by_staleness"] == (None if by_staleness is None else {"2": found[2]})
