"""The first groups start one after the other, so that they do not all end at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine


def groups(count: int, max_tokens: int) -> list[GenerationRequest]:
    """`count` groups of four."""
    prompts = [np.arange(3 + group, 9 + group, dtype=np.int32) for group in range(count)]
    return [
        GenerationRequest(key, prompts[key // 4], max_tokens, seed=key) for key in range(4 * count)
    ]


def ends(engine: TransformersEngine) -> dict[int, int]:
    """How many completions end in a step, by its number; of those where any does."""
    counts: dict[int, int] = {}
    step = 0
    while engine.active:
        step += 1
        if ended := len(engine.step()):
            counts[step] = ended
    return counts


def test_the_first_groups_are_spread_over_their_length_and_later_ones_are_not(
    student: Any,
) -> None:
    engine = TransformersEngine(student, (), slots=16)
    engine.add(groups(4, max_tokens=40))
    assert ends(engine) == {40: 4, 49: 4, 59: 4, 69: 4}
    engine.add(groups(4, max_tokens=40))
    assert ends(engine) == {40: 16}


def test_short_completions_all_start_at_once(student: Any) -> None:
    engine = TransformersEngine(student, (), slots=16)
    engine.add(groups(4, max_tokens=31))
    assert ends(engine) == {31: 16}


def test_where_completions_are_shorter_than_they_may_be_the_rest_starts_with_the_first_end(
    student: Any,
) -> None:
    engine = TransformersEngine(student, range(128), slots=16)  # whatever is written ends it
    engine.add(groups(4, max_tokens=40))
    assert ends(engine) == {1: 4, 2: 12}


def test_an_answer_of_one_token_says_nothing_of_how_long_others_are(student: Any) -> None:
    engine = TransformersEngine(student, (), slots=16)
    probe = GenerationRequest(-1, np.arange(50, 54, dtype=np.int32), 1, seed=0)
    engine.add([probe, *groups(2, max_tokens=40)])
    assert ends(engine) == {1: 1, 41: 4, 60: 4}
