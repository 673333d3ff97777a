"""Packed rows: what goes where, and which token sees which."""

from __future__ import annotations

import numpy as np
import pytest

from onstream.pipeline.models import packing
from onstream.pipeline.models.packing import SharedPrefixRow, pack, share_prompts
from onstream.pipeline.models.padded_rows import single_rows
from tests.tiny import sequences


def visible(packed: SharedPrefixRow) -> np.ndarray:
    """[T, T]: whether a token sees another one, read back from the attention calls."""
    seen = np.zeros((len(packed.input_ids),) * 2, dtype=bool)
    place = 0
    for call in packed.calls:
        for row in range(len(call.queries)):
            mask = np.tri(call.queries.shape[1], dtype=bool)
            if call.mask is not None:
                mask = call.mask[row % len(call.mask)]
            for query, keys in zip(call.queries[row], mask, strict=True):
                if packed.output_index[query] == place:
                    seen[query, call.keys[row][keys]] = True
                place += 1
    return seen


def expected_visible(packed: SharedPrefixRow) -> np.ndarray:
    """The same, written out.

    A prompt token sees the prompt up to itself, a completion's token also the completion up to
    itself. The common start is a part of every prompt.
    """
    seen = np.zeros((len(packed.input_ids),) * 2, dtype=bool)
    at = packed.start
    for group in packed.groups:
        own = at + np.arange(len(group.prompt_ids) - packed.start)
        prompt = np.concatenate((np.arange(packed.start), own))
        seen[np.ix_(prompt, prompt)] = np.tri(len(prompt), dtype=bool)
        at += len(own)
        for completion in group.completions:
            own = at + np.arange(len(completion) - 1)
            seen[np.ix_(own, prompt)] = True
            seen[np.ix_(own, own)] = np.tri(len(own), dtype=bool)
            at += len(own)
    return seen


def test_a_prompt_with_two_completions_is_laid_out_as_the_docstring_says() -> None:
    groups = share_prompts([[5, 6], [5, 6]], [[7, 8, 9], [4]])
    (packed,) = pack(groups, max_tokens=16)
    assert packed.input_ids.tolist() == [5, 6, 7, 8]
    assert packed.position_ids.tolist() == [0, 1, 2, 3]
    assert packed.predicted_at.tolist() == [1, 2, 3, 1]
    assert packed.targets.tolist() == [7, 8, 9, 4]
    assert (packed.sequences, packed.lengths) == ((0, 1), (3, 1))


def test_positions_restart_after_the_prompt_in_every_completion() -> None:
    (packed,) = pack(
        share_prompts([[5, 6, 7]] * 2 + [[9]], [[1, 2, 3], [4, 5, 6, 7], [8, 8]]), max_tokens=64
    )
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]


def test_equal_prompts_are_grouped_in_the_order_in_which_they_first_come() -> None:
    groups = share_prompts([[1, 2], [3], [1, 2], [3, 0]], [[4], [5], [6], [7]])
    assert [(group.prompt_ids.tolist(), group.sequences) for group in groups] == [
        ([1, 2], (0, 2)),
        ([3], (1,)),
        ([3, 0], (3,)),
    ]


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_an_empty_prompt_or_completion_is_refused_with_its_place(
    prompt: list[int], completion: list[int]
) -> None:
    with pytest.raises(ValueError, match="sequence 1 has"):
        share_prompts([[1], prompt], [[1], completion])


@pytest.mark.parametrize("start", [0, 1, 9])
@pytest.mark.parametrize("dense_row_tokens", [0, 20, 512])
@pytest.mark.parametrize("group_size", [1, 2, 5])
def test_every_token_sees_its_prompt_and_its_own_past_and_nothing_else(
    group_size: int, dense_row_tokens: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "DENSE_ROW_TOKENS", dense_row_tokens)
    monkeypatch.setattr(packing, "START_SHARE", 0)
    prompts, completions = sequences(6, group_size, seed=group_size)
    prompts = [np.concatenate((np.arange(start), prompt)) for prompt in prompts]
    rows = pack(share_prompts(prompts, completions), max_tokens=90, share_start=True)
    assert {row.start for row in rows if len(row.groups) > 1} == {start}
    for packed in rows:
        np.testing.assert_array_equal(visible(packed), expected_visible(packed))


def test_tokens_that_all_prompts_begin_with_stand_once_in_a_row() -> None:
    prompts = [[5, 6, 7], [5, 6, 8, 8], [5, 6, 7]]
    groups = share_prompts(prompts, [[1, 2], [3, 4], [9]])
    (packed,) = pack(groups, max_tokens=32, share_start=True)
    assert packed.start == 2
    assert packed.input_ids.tolist() == [5, 6, 7, 1, 8, 8, 3]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert packed.predicted_at.tolist() == [2, 3, 2, 5, 6]
    assert packed.targets.tolist() == [1, 2, 9, 3, 4]
    assert packed.sequences == (0, 2, 1)


@pytest.mark.parametrize(
    ("prompts", "start"),
    [
        ([[1, 2, 3], [1, 2, 3, 4]], 2),  # one is the beginning of the other
        ([[1], [1, 2]], 0),
        ([[1, 2, 3], [4, 2, 3]], 0),
        ([[1, 2, 3]] * 2, 0),  # one group
        ([[1, *[7] * 40], [1, *[8] * 40]], 0),  # not worth it
    ],
)
def test_every_prompt_keeps_a_token_of_its_own(prompts: list[list[int]], start: int) -> None:
    (packed,) = pack(share_prompts(prompts, [[9], [9]]), max_tokens=99, share_start=True)
    assert packed.start == start


def test_a_common_start_is_not_shared_where_a_prompt_shows_an_image() -> None:
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5]]
    groups = share_prompts(prompts, [[9], [9]], [("cat",), ()])
    (packed,) = pack(groups, max_tokens=99, share_start=True)
    assert packed.start == 0


def test_rows_with_a_common_start_keep_to_the_budget_and_hold_more() -> None:
    prompts, completions = sequences(12, 2, prompt=(3, 9), completion=(1, 9), seed=3)
    prompts = [np.concatenate((np.arange(30), prompt)) for prompt in prompts]
    groups = share_prompts(prompts, completions)
    rows = pack(groups, max_tokens=100, share_start=True)
    assert max(len(row.input_ids) for row in rows) <= 100
    assert sorted(sequence for row in rows for sequence in row.sequences) == list(range(24))
    assert len(rows) < len(pack(groups, max_tokens=100))


def test_no_row_exceeds_the_budget_and_every_completion_is_packed_once() -> None:
    prompts, completions = sequences(7, 6, prompt=(3, 30), completion=(1, 25), seed=3)
    rows = pack(share_prompts(prompts, completions), max_tokens=70)
    assert max(len(row.input_ids) for row in rows) <= 70
    assert sorted(sequence for row in rows for sequence in row.sequences) == list(range(42))
    for row in rows:
        starts = np.cumsum([0, *row.lengths])
        for sequence, start, end in zip(row.sequences, starts, starts[1:], strict=False):
            np.testing.assert_array_equal(row.targets[start:end], completions[sequence])


def test_a_group_over_the_budget_is_split_with_its_prompt_repeated() -> None:
    rows = pack(share_prompts([[9] * 4] * 3, [[1, 2, 3, 4], [5, 6, 7], [8, 9]]), max_tokens=9)
    assert [row.input_ids.tolist() for row in rows] == [
        [9, 9, 9, 9, 1, 2, 3, 5, 6],
        [9, 9, 9, 9, 8],
    ]


def test_a_single_sequence_over_the_budget_has_a_row_of_its_own() -> None:
    rows = pack(
        share_prompts([[1] * 4, [2] * 40, [3] * 4], [[1] * 3, [2] * 3, [3] * 3]), max_tokens=16
    )
    assert [len(row.input_ids) for row in rows] == [6, 42, 6]


def test_rows_of_very_different_length_do_not_pad_each_other() -> None:
    prompts = [[1] * 100, [2] * 10, [3] * 9]
    (packed,) = pack(share_prompts(prompts, [[1, 1]] * 3), max_tokens=1000)
    assert [call.queries.shape for call in packed.calls] == [(1, 101), (2, 11)]


def test_a_long_group_attends_to_its_prompt_without_a_square_mask() -> None:
    (packed,) = pack(share_prompts([[1] * 300] * 4, [[2] * 100] * 4), max_tokens=1000)
    prompt, branches = packed.calls
    assert (prompt.queries.shape, prompt.mask) == ((1, 300), None)
    assert branches.mask is not None
    assert (branches.queries.shape, branches.keys.shape, branches.mask.shape) == (
        (4, 99),
        (4, 399),
        (4, 99, 399),
    )


def test_short_completions_of_a_long_prompt_share_one_copy_of_its_keys() -> None:
    (packed,) = pack(share_prompts([[1] * 600] * 9, [[2] * 20] * 9), max_tokens=1000)
    _, branches = packed.calls
    assert (branches.queries.shape, branches.keys.shape) == ((2, 7 * 19), (2, 600 + 7 * 19))
    np.testing.assert_array_equal(visible(packed), expected_visible(packed))


def test_a_long_prompt_whose_completions_are_one_token_needs_the_prompt_alone() -> None:
    (packed,) = pack(share_prompts([[1] * 600] * 2, [[2], [3]]), max_tokens=1000)
    assert [call.queries.shape for call in packed.calls] == [(1, 600)]
    assert packed.predicted_at.tolist() == [599, 599]


def test_single_rows_share_nothing_and_stand_longest_first() -> None:
    groups = single_rows([[1, 2], [3], [1, 2]], [[4], [5, 6, 7], [8, 9, 9, 9]])
    assert [(group.prompt_ids.tolist(), group.sequences) for group in groups] == [
        ([1, 2], (2,)),
        ([3], (1,)),
        ([1, 2], (0,)),
    ]
