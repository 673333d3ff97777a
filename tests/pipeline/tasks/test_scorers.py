"""What scorers return, and what it means."""

from __future__ import annotations

import numpy as np
import pytest

from onstream.pipeline.tasks import ScoreError, read_score
from onstream.pipeline.tasks.scorers import match_answer


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("abcd", {"reward": 1.0, "similarity": 1.0}),
        ("  abcd\n", {"reward": 1.0, "similarity": 1.0}),
        ("<think>dcba, reversed</think>\n\nabcd", {"reward": 1.0, "similarity": 1.0}),
        ("abce", {"reward": 0.0, "similarity": 0.75}),
        ("abcde", {"reward": 0.0, "similarity": 0.8}),
        ("ABCD", {"reward": 0.0, "similarity": 0.0}),
        ("<think>abcd", {"reward": 0.0, "similarity": 0.0}),
        ("", {"reward": 0.0, "similarity": 0.0}),
    ],
)
def test_only_the_exact_answer_after_any_reasoning_is_rewarded(
    completion: str, expected: dict[str, float]
) -> None:
    assert match_answer(completion, {"answer": "abcd"}) == expected


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.5, (0.5, {})),
        (True, (1.0, {})),
        (np.float32(0.25), (0.25, {})),
        ({"format": 0.5, "answer": 1}, (1.5, {"format": 0.5, "answer": 1.0})),
        ({"reward": -1, "format": 0.5}, (-1.0, {"format": 0.5})),
    ],
)
def test_a_score_is_a_number_or_parts_that_add_up_unless_one_is_the_reward(
    score: object, expected: object
) -> None:
    assert read_score(score) == expected


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (None, "the score is None; expected a number"),
        ("1", "the score is '1'; expected a number"),
        ([1.0], r"the score is \[1.0\]; expected a number"),
        (float("inf"), "the score is inf; expected a finite number"),
        ({}, "the scorer returned 0 parts"),
        ({str(name): 1.0 for name in range(65)}, "the scorer returned 65 parts; expected 1 to 64"),
        ({"format": float("nan")}, "part 'format' is nan; expected a finite number"),
        ({"format": "good"}, "part 'format' is 'good'; expected a number"),
        ({"a": 1e308, "b": 1e308}, "the sum of the parts is inf"),
    ],
)
def test_what_is_no_score_is_refused_in_words(score: object, words: str) -> None:
    with pytest.raises(ScoreError, match=words):
        read_score(score)
