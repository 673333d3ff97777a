"""Trainer, teacher and the built-in engine, beside plain forward passes of transformers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.models.logprobs import token_logprobs
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.student import load_student
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from tests.gpu.reference import Expected, Pair, groups, plain_model

DTYPES = ("float32", "bfloat16")
TRIED = [("float32", "sdpa"), ("bfloat16", "sdpa"), ("bfloat16", "varlen")]
"""The precision, and how rows are read."""
TOP_K = 8


def settings_of(
    model_dir: Path, device: torch.device, dtype: str, attention: str = "auto"
) -> Settings:
    return Settings.model_validate(
        {
            "model": {"name": str(model_dir)},
            "deployment": {"device": device.type},
            "inference": {"engine": "transformers", "dtype": dtype, "max_batch": 16},
            "teacher_inference": {
                "engine": "transformers",
                "dtype": dtype,
                "attention": attention,
            },
        }
    )


def learner_of(model_dir: Path, device: torch.device, dtype: str, **given: Any) -> Learner:
    recompute = given.pop("recompute", False)
    settings = {"dtype": dtype, "microbatch": 512, "optim": {"lr": 1e-3, "warmup": 0}, **given}
    trainer = TrainerSettings.model_validate(settings)
    return Learner(model_dir, trainer, device, recompute=recompute)


@pytest.mark.parametrize(("dtype", "attention"), TRIED)
def test_the_trainer_computes_the_logprobs_of_plain_forward_passes(
    model_dir: Path, device: torch.device, dtype: str, attention: str
) -> None:
    pairs = groups()
    learner = learner_of(model_dir, device, dtype, attention=attention)
    assert learner.padded_because is None
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for packed in learner.pack([one for one, _ in pairs], [other for _, other in pairs]):
            hidden = learner.hidden(packed)
            targets = torch.from_numpy(packed.targets).to(device)
            scored = token_logprobs(hidden, learner.head, targets).sampled
            parts = scored.split(list(packed.lengths))
            found |= dict(zip(packed.sequences, parts, strict=True))
    ours = torch.cat([found[at] for at in range(len(pairs))])
    Expected(model_dir, pairs, getattr(torch, dtype), device).check(ours)


def samples(pairs: list[Pair]) -> list[TrainSample]:
    """`pairs` to fit: every token of the completions counts alike."""
    return [
        TrainSample(
            prompt_ids=prompt,
            completion_ids=completion,
            loss_mask=np.ones(len(completion), dtype=np.uint8),
            generator_logprobs=None,
            group=len(prompt),
        )
        for prompt, completion in pairs
    ]


def test_the_trainer_takes_the_gradient_of_a_plain_loss(
    model_dir: Path, device: torch.device
) -> None:
    pairs = groups()
    learner = learner_of(model_dir, device, "float32", loss={"type": "sft"})
    metrics = learner.step(samples(pairs), 10)
    model = plain_model(model_dir, torch.float32, device)
    tokens = sum(len(completion) for _, completion in pairs)
    total = 0.0
    for prompt, completion in pairs:
        ids = torch.from_numpy(np.concatenate((prompt, completion)).astype(np.int64)).to(device)
        logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="sum")
        (loss / tokens).backward()
        total += loss.item() / tokens
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_a_step_by_cumulative_lengths_is_one_under_masks(
    model_dir: Path, device: torch.device
) -> None:
    masks, lengths = (
        learner_of(model_dir, device, "bfloat16", loss={"type": "sft"}, attention=attention).step(
            samples(groups()), 10
        )
        for attention in ("sdpa", "varlen")
    )
    assert lengths["loss"] == pytest.approx(masks["loss"], rel=1e-2)
    assert lengths["grad_norm"] == pytest.approx(masks["grad_norm"], rel=3e-2)


@pytest.mark.parametrize(("dtype", "attention"), TRIED)
def test_the_built_in_teacher_scores_as_plain_forward_passes_do(
    model_dir: Path, device: torch.device, dtype: str, attention: str
) -> None:
    pairs = groups()
    expected = Expected(model_dir, pairs, getattr(torch, dtype), device)
    requests = [ScoreRequest(prompt, completion) for prompt, completion in pairs]
    with closing(load_local(settings_of(model_dir, device, dtype, attention))) as scorer:
        scored = scorer.score(requests, top_k=TOP_K)
    expected.check(torch.cat([torch.from_numpy(one.logprobs) for one in scored]))
    for one, exact in zip(scored, expected.logprobs, strict=True):
        assert one.top_ids is not None and one.top_logprobs is not None
        assert one.tail_logprobs is not None
        ids = torch.from_numpy(one.top_ids.astype(np.int64))
        gaps = exact.gather(1, ids) - torch.from_numpy(one.top_logprobs)
        assert gaps.abs().max().item() <= expected.nats
        mass = np.exp(one.top_logprobs).sum(1) + np.exp(one.tail_logprobs)
        np.testing.assert_allclose(mass, 1.0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_says_the_logprobs_that_plain_forward_passes_have(
    model_dir: Path, device: torch.device, dtype: str
) -> None:
    prompts = [prompt for prompt, _ in groups()]
    asked = [
        GenerationRequest(key, prompt, max_tokens=24 + key, seed=key)
        for key, prompt in enumerate(prompts)
    ]
    engine = load_student(str(model_dir), settings_of(model_dir, device, dtype)).engine
    written: dict[int, Completion] = {}
    with closing(engine):
        engine.add(asked)
        while engine.active:
            written |= {one.key: one for one in engine.step()}
    pairs = [(prompt, written[key].token_ids) for key, prompt in enumerate(prompts)]
    ours = torch.cat([torch.from_numpy(written[key].logprobs) for key in range(len(prompts))])
    Expected(model_dir, pairs, getattr(torch, dtype), device).check(ours)


def weights_after(learner: Learner, steps: int) -> torch.Tensor:
    batch = samples(groups())
    for _ in range(steps):
        learner.step(batch, 10)
    return torch.cat([weight.detach().flatten() for weight in learner.model.parameters()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("deterministic")
def test_the_same_steps_give_the_same_bits(
    model_dir: Path, device: torch.device, dtype: str
) -> None:
    first, second = (
        weights_after(learner_of(model_dir, device, dtype, loss={"type": "sft"}), 1)
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.usefixtures("deterministic")
def test_layers_computed_anew_change_no_bit_in_float32(
    model_dir: Path, device: torch.device
) -> None:
    plain, again = (
        weights_after(
            learner_of(model_dir, device, "float32", loss={"type": "sft"}, recompute=recompute), 1
        )
        for recompute in (False, True)
    )
    assert torch.equal(plain, again)


def test_steps_with_moments_in_8_bits_are_near_those_in_32(
    model_dir: Path, device: torch.device
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the extra `8bit`")
    batch = samples(groups())
    losses = {}
    for states in ("device", "8bit"):
        optim = {"lr": 1e-3, "warmup": 0, "states": states}
        learner = learner_of(model_dir, device, "float32", loss={"type": "sft"}, optim=optim)
        losses[states] = [learner.step(batch, 10)["loss"] for _ in range(3)]
    assert losses["8bit"] == pytest.approx(losses["device"], rel=0.02)
