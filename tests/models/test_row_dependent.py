"""Rotary positions that depend on the longest row of a batch: each sequence is computed alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.models.prompt_sharing import prepare
from onstream.settings.sections.losses import SftLoss
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE, character_tokenizer
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from tests.models.exactness import generator_gap, plain_logprobs, scoring_gap
from tests.models.families import tiny_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 4.0, 9.0, 16.0],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
TRAINER = TrainerSettings(loss=SftLoss(), optim=OptimSettings(lr=1e-3, warmup=0))
CASES: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ("llama", {"rope_parameters": LONGROPE}),
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=["phi3", "llama"])
def test_a_long_neighbour_changes_no_short_sequence(family: str, changes: dict[str, Any]) -> None:
    assert scoring_gap(tiny_model(family, **changes)) < 1e-4
    assert "depends on a row's length" in (prepare(tiny_model(family, **changes)) or "")


@pytest.mark.parametrize(("family", "changes"), CASES, ids=["phi3", "llama"])
def test_the_built_in_generator_writes_up_to_where_positions_would_change(
    family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes)
    engine = TransformersEngine(copy.deepcopy(model), (), slots=8)
    assert engine.max_context == 64
    prompts = [np.arange(3, 3 + tokens, dtype=np.int32) for tokens in (2, 40, 60)]
    engine.add([GenerationRequest(key, ids, 64 - len(ids), key) for key, ids in enumerate(prompts)])
    while engine.active:
        for one in engine.step():
            expected = plain_logprobs(model, prompts[one.key], one.token_ids)
            assert (expected - torch.from_numpy(one.logprobs)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="may come to 65 tokens; the model takes 64"):
        engine.add([GenerationRequest(0, prompts[2], 5, seed=0)])


def test_dynamic_positions_are_exact_up_to_the_length_at_which_they_begin_to_change() -> None:
    model = tiny_model("llama", rope_parameters=DYNAMIC)
    assert generator_gap(model) < 1e-4
    assert scoring_gap(model) < 1e-4


def test_a_longer_sample_is_not_trained_on_with_dynamic_positions(tmp_path: Path) -> None:
    model = tiny_model(
        "llama", rope_parameters=DYNAMIC, max_position_embeddings=64, vocab_size=VOCABULARY_SIZE
    )
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    learner = Learner(tmp_path, TRAINER, torch.device("cpu"))
    learner.check(sample_of(60, 4))
    with pytest.raises(
        ValueError, match="has 65 tokens; expected at most the student's context of 64"
    ):
        learner.check(sample_of(60, 5))


def sample_of(prompt: int, completion: int) -> TrainSample:
    return TrainSample(
        prompt_ids=np.arange(prompt, dtype=np.int32),
        completion_ids=np.arange(completion, dtype=np.int32),
        loss_mask=np.ones(completion, dtype=np.uint8),
        generator_logprobs=np.full(completion, -1.0, dtype=np.float32),
    )
