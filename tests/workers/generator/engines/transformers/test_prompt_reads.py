"""A long prompt's keys are read once for all the rows that have it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers import slot_decoder
from onstream.workers.generator.engines.transformers.decoding_step import (
    SequenceState,
    SharedPrompts,
    rows_by_prompt,
)
from onstream.workers.generator.engines.transformers.engine import TransformersEngine

EXACT = 1e-5
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(3, 128, size).astype(np.int32) for size in (80, 66)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each product that reads them once for all their rows."""
    counts: list[int] = []
    by_prompt = slot_decoder._by_prompt

    def counting(shared: SharedPrompts, *others: Any) -> Any:
        counts.append(len(shared.leaders))
        return by_prompt(shared, *others)

    monkeypatch.setattr(slot_decoder, "_by_prompt", counting)
    return counts


def test_rows_that_read_their_prompts_together_are_exact(
    student: Any,
    other_weights: dict[str, torch.Tensor],
    plain_logprobs: Callable[..., Any],
    reads: list[int],
) -> None:
    # Neighbours have different prompts and end at different times.
    wanted = [
        GenerationRequest(key, PROMPTS[key % 3 > 0], 3 + key * 5 % 11, seed=key)
        for key in range(60)
    ]
    first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    engine = TransformersEngine(student, (), slots=60)
    engine.add(wanted)
    assert engine.step() + engine.step() == []
    before = len(reads)
    engine.load(LoadedPolicy.of(1, other_weights))
    written = []
    while engine.active:
        written += engine.step()
    assert 0 < before < len(reads) and set(reads) == {2}
    assert len(written) == 60
    for one in written:
        for span in one.version_spans:
            weights = other_weights if span.version else first
            plain = plain_logprobs(wanted[one.key].prompt_ids, one.token_ids, weights=weights)
            gap = np.abs(plain[np.arange(len(one.token_ids)), one.token_ids] - one.logprobs)
            assert gap[span.start : span.end].max() < EXACT


@pytest.mark.parametrize(
    ("prompt", "rows"), [(PROMPTS[0][:63], 60), (PROMPTS[0], 8)], ids=["short prompt", "few rows"]
)
def test_where_little_is_saved_each_row_reads_its_own(
    student: Any, reads: list[int], prompt: Any, rows: int
) -> None:
    engine = TransformersEngine(student, (), slots=60)
    engine.add([GenerationRequest(key, prompt, 3, seed=key) for key in range(rows)])
    while engine.active:
        engine.step()
    assert reads == []


def test_rows_share_what_one_version_computed_of_their_prompt() -> None:
    old, new, other = (
        SequenceState(GenerationRequest(key, prompt, 5, seed=key))
        for key, prompt in enumerate((PROMPTS[0], PROMPTS[0], PROMPTS[1]))
    )
    old.spans += [(0, 0), (1, 2)]  # its keys may be kept from version 0
    new.spans += [(1, 0)]
    other.spans += [(1, 0)]
    assert rows_by_prompt([old, new, other, new, old]) == [[0, 4], [1, 3], [2]]
