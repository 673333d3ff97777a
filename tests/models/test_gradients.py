"""A training step's gradient is the one that the model's own code has, one sequence at a time.

A model of each kind that rows are laid out for in a way of its own. The reference computes in
float64, the trainer as it does: in float32, in rows of its own making.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onstream.pipeline.models.forward import NO_IMAGES
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.multimodal import Features
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE, character_tokenizer
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from tests.models.families import tiny_config

CPU = torch.device("cpu")
CLOSE = 1e-5
"""Of a difference between gradients, by its L2 norm, relative to that of the gradient."""
PROMPTS = (4, 40)
COMPLETIONS = (1, 7, 30)
WINDOW = 12
"""Tokens: longer than one prompt, and shorter than the others."""
TEACHER_TAU = 0.5
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("qwen3", {}),
    "padded": ("stablelm", {}),
    "window": ("mistral", {"sliding_window": WINDOW}),
    "window in some layers": ("gemma3_text", {"sliding_window": WINDOW}),
    # Its float32 products of small norms round off more with wider weights.
    "hybrid": ("qwen3_5_text", {"initializer_range": 0.05}),
    "hybrid of convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "hybrid of state spaces": ("nemotron_h", {}),
    "mixture of experts": ("qwen3_moe", {}),
    "sinks": ("gpt_oss", {"sliding_window": WINDOW}),
    "soft cap": ("gemma2", {"sliding_window": WINDOW}),
    "scaled logits": ("granite", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_steps_gradient_is_that_of_single_sequences(tmp_path: Path, kind: str) -> None:
    family, changes = KINDS[kind]
    directory = written(tmp_path, family, changes)
    plain = load_model(directory, dtype=torch.float64, device=CPU)
    plain.set_experts_implementation("eager")  # torch's grouped products are not for float64
    batch = a_batch(plain)
    expected = mean_of_single(plain, batch)
    learner = learner_of(directory)
    found = gradient_of_a_step(learner, batch)
    gap = float((found - expected).norm() / expected.norm())
    print(f"{kind} ({family}, {learner.padded_because or 'packed'}): {gap:.1e}")
    assert gap <= CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_common_start_of_all_prompts_gets_the_gradient_of_them_all(
    tmp_path: Path, attention: str
) -> None:
    directory = written(tmp_path, *KINDS["packed"])
    plain = load_model(directory, dtype=torch.float64, device=CPU)
    batch = a_batch(plain, start=20)
    expected = mean_of_single(plain, batch)
    learner = learner_of(directory, attention, microbatch=200)
    rows = learner.pack(
        [sample.prompt_ids for sample in batch], [sample.completion_ids for sample in batch]
    )
    assert max(row.start for row in rows) == 20
    found = gradient_of_a_step(learner, batch)
    assert float((found - expected).norm() / expected.norm()) <= CLOSE


def written(directory: Path, family: str, changes: dict[str, Any]) -> Path:
    """A tiny model of `family` with the character tokenizer."""
    given = {"vocab_size": VOCABULARY_SIZE, "initializer_range": 0.1}
    config = tiny_config(family, **given | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def learner_of(directory: Path, attention: str = "auto", microbatch: int = 100) -> Learner:
    """A trainer of rewards and a teacher, whose rows are too short for the whole batch."""
    loss = {"teacher_tau": TEACHER_TAU, "kl_tau": 0.0}
    settings = TrainerSettings.model_validate(
        {"loss": loss, "microbatch": microbatch, "attention": attention}
    )
    return Learner(directory, settings, CPU)


def a_batch(plain: PreTrainedModel, start: int = 0) -> list[TrainSample]:
    """Groups of unlike lengths over prompts of unlike lengths, as sampled from `plain`.

    All prompts begin with the same `start` tokens.
    """
    random = np.random.default_rng(5)
    batch = []
    common = np.arange(3, 3 + start, dtype=np.int32)
    for group, tokens in enumerate(PROMPTS):
        prompt = random.integers(3, VOCABULARY_SIZE, tokens).astype(np.int32)
        prompt = np.concatenate((common, prompt))
        for own in COMPLETIONS:
            completion = random.integers(3, VOCABULARY_SIZE, own).astype(np.int32)
            mask = random.random(own) < 0.8
            mask[0] = True
            sample = TrainSample(
                prompt,
                completion,
                mask.astype(np.uint8),
                np.zeros(own, np.float32),
                advantage=float(random.normal()),
                group=group,
            )
            sampled = own_logprobs(plain, sample).detach().float().numpy()
            sample.generator_logprobs = sampled
            sample.teacher_logprobs = sampled + random.normal(0, 1, own).astype(np.float32)
            batch.append(sample)
    return batch


def own_logprobs(plain: PreTrainedModel, sample: TrainSample) -> Tensor:
    """[C], of a sample's completion, by the model's own forward over this sequence alone."""
    ids = torch.from_numpy(np.concatenate((sample.prompt_ids, sample.completion_ids))).long()
    logits = plain(input_ids=ids[None], use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
    targets = torch.from_numpy(sample.completion_ids).long()
    return logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def mean_of_single(plain: PreTrainedModel, batch: list[TrainSample]) -> Tensor:
    """The gradient of the mean over the loss-mask tokens, flat.

    On policy, that of −(advantage − tau · reverse KL) · logprob, the bracket held constant.
    """
    tokens = sum(int(sample.loss_mask.sum()) for sample in batch)
    for sample in batch:
        logprobs = own_logprobs(plain, sample)
        teacher = torch.from_numpy(sample.teacher_logprobs)
        weight = sample.advantage - TEACHER_TAU * (logprobs.detach() - teacher)
        loss = -(weight * logprobs * torch.from_numpy(sample.loss_mask)).sum() / tokens
        loss.backward()
    return flat_gradient(plain)


def gradient_of_a_step(
    learner: Learner, batch: list[TrainSample], features: Features = NO_IMAGES
) -> Tensor:
    """The gradient that the optimizer gets, before clipping, flat."""
    found: list[Tensor] = []

    def keep(max_steps: int) -> dict[str, float]:
        found.append(flat_gradient(learner.model))
        return {}

    learner._update = keep  # type: ignore[method-assign]
    learner.step(batch, 10, features=features)
    return found[0]


def flat_gradient(model: PreTrainedModel) -> Tensor:
    """All gradients in one; 0 where a weight had no part."""
    parts = [
        torch.zeros_like(weight) if weight.grad is None else weight.grad
        for _, weight in sorted(model.named_parameters())
    ]
    return torch.cat([part.flatten().double() for part in parts])
