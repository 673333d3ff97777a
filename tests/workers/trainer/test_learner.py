"""Whole training steps of a tiny student."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import hidden_states
from onstream.pipeline.models.logprobs import token_logprobs
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import pack, share_prompts
from onstream.settings.sections.run import ModelSettings
from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from tests.tiny import VOCABULARY, Family, sequences, write_tiny

CPU = torch.device("cpu")
LR = 1e-3


def learner(
    directory: Path,
    *,
    optim: dict[str, Any] | None = None,
    microbatch: int = 8192,
    dtype: str = "auto",
    **loss: Any,
) -> Learner:
    settings = TrainerSettings.model_validate(
        {
            "loss": loss,
            "optim": OptimSettings(**{"lr": LR, "warmup": 0, **(optim or {})}),
            "microbatch": microbatch,
            "dtype": dtype,
        }
    )
    return Learner(directory, settings, CPU)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("student"))


def logprobs_by(
    policy: Learner,
    prompts: list[Any],
    completions: list[Any],
    top_k: int = 0,
    temperature: float = 1.0,
) -> list[dict[str, Any]]:
    """The logprobs of each completion, as a teacher or the generator sends them."""
    said: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for packed in pack(share_prompts(prompts, completions), 8192):
            hidden = hidden_states(policy.model, packed)
            targets = torch.from_numpy(packed.targets)
            found = token_logprobs(
                hidden,
                head_of(policy.model),
                targets,
                temperature=temperature,
                top_k=max(top_k, 1),
            )
            assert found.top is not None
            columns = [found.sampled, found.top.ids.int(), found.top.logprobs, found.top.tail]
            for sequence, *parts in zip(
                packed.sequences, *(column.split(packed.lengths) for column in columns), strict=True
            ):
                said[sequence] = dict(
                    zip(
                        ("sampled", "ids", "top", "tail"),
                        (part.numpy() for part in parts),
                        strict=True,
                    )
                )
    return [said[sequence] for sequence in range(len(prompts))]


def samples(
    policy: Learner,
    teacher: Learner | None = None,
    *,
    top_k: int = 0,
    temperature: float = 1.0,
    groups: int = 4,
) -> list[TrainSample]:
    """On-policy samples of groups of 4, with made-up rewards.

    Every third one has a token outside the loss mask.
    """
    prompts, completions = sequences(groups, 4, completion=(2, 7), seed=11)
    generator = logprobs_by(policy, prompts, completions, temperature=temperature)
    scores: list[dict[str, Any]] = [{}] * len(prompts)
    if teacher:
        scores = logprobs_by(teacher, prompts, completions, top_k)
    found = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        mask = np.ones(len(completion), dtype=np.uint8)
        mask[0] = index % 3 != 0
        found.append(
            TrainSample(
                prompt_ids=prompt.astype(np.int32),
                completion_ids=completion.astype(np.int32),
                loss_mask=mask,
                generator_logprobs=generator[index]["sampled"],
                teacher_logprobs=scores[index].get("sampled"),
                teacher_top_ids=scores[index]["ids"] if top_k else None,
                teacher_top_logprobs=scores[index]["top"] if top_k else None,
                teacher_tail_logprobs=scores[index]["tail"] if top_k else None,
                advantage=[0.75, -0.25, -0.25, -0.25][index % 4],
                group=index // 4,
                temperature=temperature,
            )
        )
    return found


def weights(of: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in of.model.state_dict().items()}


def gradient(of: Learner, batch: list[TrainSample], global_tokens: int | None = None) -> Tensor:
    """The step's gradient, before clipping, flat."""
    kept: list[Tensor] = []
    update = of._update
    of._update = lambda max_steps: (
        kept.extend(weight.grad.flatten() for weight in of.model.parameters()) or {}
    )  # type: ignore
    try:
        of.step(batch, 10, global_tokens=global_tokens)
    finally:
        of._update = update  # type: ignore[method-assign]
        of.model.zero_grad()
    return torch.cat(kept)


@pytest.mark.parametrize("top_k", [0, 4])
def test_with_the_student_as_its_own_teacher_the_first_step_has_nothing_to_learn(
    student: Path, top_k: int
) -> None:
    found = learner(student, adv_tau=0.0, teacher_tau=1.0, teacher_top_k=top_k)
    metrics = found.step(samples(found, found, top_k=top_k), 10)
    assert abs(metrics["teacher_kl"]) < 1e-5
    assert metrics["grad_norm"] < 1e-5
    assert metrics["mismatch_max"] < 1e-5


@pytest.mark.parametrize(
    "case", [{"teacher_tau": 0.5}, {"teacher_tau": 0.5, "teacher_top_k": 3}, {"type": "sft"}, {}]
)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_gradient_does_not_depend_on_how_the_samples_are_packed(
    tmp_path: Path, family: Family, case: dict[str, Any]
) -> None:
    directory = write_tiny(tmp_path / "student", family)
    teacher = learner(write_tiny(tmp_path / "teacher", family, seed=1))
    whole = learner(directory, **case)
    split = learner(directory, microbatch=16, **case)
    batch = samples(whole, teacher, top_k=case.get("teacher_top_k", 0))
    expected = gradient(whole, batch)
    torch.testing.assert_close(
        gradient(split, batch[::-1]), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def of_two_teachers(policy: Learner, teacher: Learner) -> list[TrainSample]:
    """Samples with 3 of the teacher's alternatives, 1, or none, side by side in each group."""
    given = samples(policy, teacher, top_k=3)
    for index, sample in enumerate(given):
        k = (3, 1, 0, 3)[index % 4]
        assert sample.teacher_top_ids is not None and sample.teacher_top_logprobs is not None
        if k < 3:
            sample.teacher_tail_logprobs = None
        if k == 0:
            sample.teacher_baseline = 0.25 * index
        sample.teacher_top_ids = sample.teacher_top_ids[:, :k] if k else None
        sample.teacher_top_logprobs = sample.teacher_top_logprobs[:, :k] if k else None
    return given


def test_each_sample_of_a_step_is_trained_with_the_alternatives_that_it_has(
    student: Path, tmp_path: Path
) -> None:
    teacher = learner(write_tiny(tmp_path, seed=1))
    auto = learner(student, teacher_tau=0.5)
    batch = of_two_teachers(auto, teacher)
    tokens = sum(int(sample.loss_mask.sum()) for sample in batch)
    apart = []
    for k in (3, 1, 0):
        alike = [one for one in batch if width(one) == k]
        given = auto if k == 0 else learner(student, teacher_tau=0.5, teacher_top_k=k)
        apart.append(gradient(given, alike, global_tokens=tokens))
    whole = gradient(auto, batch)
    torch.testing.assert_close(sum(apart), whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    small = learner(student, teacher_tau=0.5, microbatch=16)
    torch.testing.assert_close(
        gradient(small, batch), whole, rtol=0, atol=1e-5 * whole.abs().max().item()
    )
    mean = sum(width(one) * int(one.loss_mask.sum()) for one in batch) / tokens
    assert auto.step(batch, 10)["teacher_top_k"] == pytest.approx(mean)


def width(sample: TrainSample) -> int:
    return 0 if sample.teacher_top_ids is None else sample.teacher_top_ids.shape[1]


@pytest.mark.parametrize(
    ("k", "loss", "temperature", "words"),
    [
        (9, {}, 1.0, "expected (3, 8), or fewer from 1 on"),
        (0, {}, 0.7, "has teacher_top_ids of shape None"),
        (0, {"teacher_divergence": "forward"}, 1.0, "has teacher_top_ids of shape None"),
        (1, {"teacher_top_k": 2}, 1.0, "has teacher_top_ids of shape (3, 1); expected (3, 2)"),
        (0, {}, 1.0, None),
        (8, {}, 0.7, None),
        (1, {"teacher_divergence": "forward"}, 1.0, None),
    ],
)
def test_a_sample_with_other_alternatives_than_its_loss_can_take_is_refused(
    student: Path, k: int, loss: dict[str, Any], temperature: float, words: str | None
) -> None:
    ids = np.array([4, 5, 6], dtype=np.int32)
    logprobs = np.full(3, -1.0, dtype=np.float32)
    sample = TrainSample(ids, ids, np.ones(3, dtype=np.uint8), logprobs, teacher_logprobs=logprobs)
    if k:
        sample.teacher_top_ids = np.tile(np.arange(k, dtype=np.int32), (3, 1))
        sample.teacher_top_logprobs = np.full((3, k), np.log(0.9 / k), dtype=np.float32)
    sample.temperature = temperature
    found = learner(student, teacher_tau=1.0, **loss)
    if words is None:
        found.check(sample)
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        found.check(sample)


def test_a_model_that_cannot_share_prompts_has_the_same_gradient_from_padded_rows(
    student: Path,
) -> None:
    shared = learner(student)
    padded = learner(student, microbatch=64)
    padded.padded_because = "as if its code could not"
    padded.model.set_attn_implementation("sdpa")
    batch = samples(shared)
    prompts = [sample.prompt_ids for sample in batch]
    rows = padded.pack(prompts, [sample.completion_ids for sample in batch])
    assert max(len(row.input_ids) for row in rows) <= 64
    expected = gradient(shared, batch)
    torch.testing.assert_close(
        gradient(padded, batch), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_a_steps_gradient_is_the_naive_one(student: Path, tmp_path: Path) -> None:
    """One sequence at a time, all logits, plain autograd, and the formula written out."""
    teacher = learner(write_tiny(tmp_path, seed=1))
    found = learner(student, teacher_tau=0.5, kl_tau=0.01)
    batch = samples(found, teacher)
    for sample in batch:
        sample.generator_logprobs = sample.generator_logprobs - np.float32(0.1)
    total = torch.zeros(())
    tokens = 0
    found.model.set_attn_implementation("sdpa")
    for sample in batch:
        ids = torch.from_numpy(np.concatenate((sample.prompt_ids, sample.completion_ids))).long()
        logits = found.model(input_ids=ids[None], use_cache=False).logits[0]
        targets = torch.from_numpy(sample.completion_ids).long()[:, None]
        predictions = logits[len(sample.prompt_ids) - 1 : -1]
        trainer = predictions.log_softmax(-1).gather(1, targets)[:, 0]
        generator = torch.from_numpy(sample.generator_logprobs)
        scores = torch.from_numpy(sample.teacher_logprobs)
        log_ratio = trainer - generator
        advantage = (sample.advantage - 0.5 * (trainer - scores)).detach()
        moved = (trainer.exp() - generator.exp()).detach()
        dropped = ((advantage > 0) & (moved > 0.2)) | ((advantage < 0) & (moved < -0.2))
        loss = -(~dropped).float() * log_ratio.exp() * advantage + 0.01 * log_ratio**2
        total = total + (loss * torch.from_numpy(sample.loss_mask)).sum()
        tokens += int(sample.loss_mask.sum())
    (total / tokens).backward()
    expected = torch.cat(
        [weight.grad.flatten() for weight in found.model.parameters() if weight.grad is not None]
    )
    found.model.zero_grad()
    found.model.set_attn_implementation("onstream_shared_prefix")
    torch.testing.assert_close(
        gradient(found, batch), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )
    assert found.step(batch, 10)["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)


def test_tokens_outside_the_loss_mask_do_not_count(student: Path) -> None:
    found = learner(student)
    batch = samples(found)
    changed = []
    for sample in batch:
        logprobs = np.where(sample.loss_mask, sample.generator_logprobs, -9.0)
        changed.append(replace(sample, generator_logprobs=logprobs))
    torch.testing.assert_close(gradient(found, changed), gradient(found, batch), rtol=0, atol=0)
    assert found.step(batch, 10)["tokens"] == sum(int(sample.loss_mask.sum()) for sample in batch)


def test_the_denominator_is_the_global_token_count(student: Path) -> None:
    found = learner(student)
    batch = samples(found)
    tokens = sum(int(sample.loss_mask.sum()) for sample in batch)
    alone = gradient(found, batch)
    ranks = sum(gradient(found, part, global_tokens=tokens) for part in (batch[:5], batch[5:]))
    torch.testing.assert_close(ranks, alone, rtol=0, atol=1e-6 * alone.abs().max().item())


def test_each_term_is_at_its_own_temperature(student: Path, tmp_path: Path) -> None:
    """Sampled at 0.6, the ratio is 1 at that temperature; teacher_kl compares both models at 1."""
    teacher = learner(write_tiny(tmp_path, seed=1))
    found = learner(student, adv_tau=0.0, teacher_tau=1.0, teacher_top_k=3)
    batch = samples(found, teacher, top_k=3, temperature=0.6)
    prompts = [sample.prompt_ids for sample in batch]
    cold = logprobs_by(found, prompts, [sample.completion_ids for sample in batch])
    difference = []
    for student_logprobs, sample in zip(cold, batch, strict=True):
        apart = student_logprobs["sampled"] - sample.teacher_logprobs
        difference.append(apart[sample.loss_mask.astype(bool)])
    metrics = found.step(batch, 10)
    assert metrics["mismatch_max"] < 1e-4
    assert metrics["teacher_kl"] == pytest.approx(
        float(np.concatenate(difference).mean()), abs=1e-5
    )


def test_the_mismatch_is_told_by_the_staleness_of_each_token(student: Path) -> None:
    """Tokens of staleness 1 were sampled 0.5 nats away, those of a tool 3.

    The loss mask counts, and packing does not.
    """
    batch = samples(learner(student))
    counts = {0: 0, 1: 0, -1: 0}
    apart = np.array([0, 0.5, -3], dtype=np.float32)  # by staleness: 0, 1, and -1 the last
    for index, sample in enumerate(batch):
        places = np.arange(index, index + len(sample.completion_ids)) % 3
        sample.staleness = np.array([0, 1, -1], dtype=np.int32)[places]
        sample.generator_logprobs = sample.generator_logprobs - apart[sample.staleness]
        for age in counts:
            counts[age] += int((sample.loss_mask.astype(bool) & (sample.staleness == age)).sum())
    for microbatch in (16, 8192):
        metrics = learner(student, microbatch=microbatch).step(batch, 10)
        fresh = metrics["mismatch_by_staleness"]["0"]
        stale = metrics["mismatch_by_staleness"]["1"]
        assert len(metrics["mismatch_by_staleness"]) == 2
        assert (fresh["tokens"], stale["tokens"]) == (counts[0], counts[1])
        assert fresh["mean"] == metrics["mismatch_fresh_mean"]
        assert fresh["max"] == metrics["mismatch_fresh_max"]
        assert fresh["max"] < 1e-4
        assert stale["mean"] == pytest.approx(0.5, abs=1e-4)
        assert stale["max"] == pytest.approx(0.5, abs=1e-4)
        assert metrics["mismatch_max"] == pytest.approx(3, abs=1e-4)


def test_supervised_loss_is_at_temperature_1_whatever_the_sampling(student: Path) -> None:
    found = learner(student, type="sft")
    hot = [replace(sample, temperature=3.0) for sample in samples(found)]
    torch.testing.assert_close(
        gradient(found, hot), gradient(found, samples(found)), rtol=0, atol=0
    )


def test_an_endpoints_missing_tail_is_computed_from_its_top_k_and_the_floored_share_is_told(
    student: Path, tmp_path: Path
) -> None:
    teacher = learner(write_tiny(tmp_path, seed=1))
    found = learner(student, adv_tau=0.0, teacher_tau=1.0, teacher_top_k=3, teacher_tail_floor=1e-6)
    given = samples(found, teacher, top_k=3)
    without = [replace(sample, teacher_tail_logprobs=None) for sample in given]
    expected = gradient(found, given)
    torch.testing.assert_close(
        gradient(found, without), expected, rtol=0, atol=1e-3 * expected.abs().max().item()
    )
    half = []
    for sample in without[:8]:
        sure = np.log([[0.7, 0.2, 0.1]] * len(sample.completion_ids)).astype(np.float32)
        half.append(replace(sample, teacher_top_logprobs=sure))
    tokens = [int(sample.loss_mask.sum()) for sample in without]
    share = found.step([*half, *without[8:]], 10)["tail_floored_share"]
    assert share == pytest.approx(sum(tokens[:8]) / sum(tokens))


def test_training_on_its_own_completions_makes_them_likelier(student: Path) -> None:
    found = learner(student, type="sft", optim={"lr": 1e-2})
    batch = samples(found)
    losses = [found.step(batch, 40)["loss"] for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_sampled_form_moves_each_token_towards_the_teachers_judgement(
    student: Path, tmp_path: Path
) -> None:
    teacher = learner(write_tiny(tmp_path, seed=1))
    found = learner(student, adv_tau=0.0, teacher_tau=1.0, optim={"lr": 1e-4})
    batch = samples(found, teacher)
    for sample in batch:
        sample.loss_mask[:] = 1
    found.step(batch, 10)
    prompts = [sample.prompt_ids for sample in batch]
    after = logprobs_by(found, prompts, [sample.completion_ids for sample in batch])
    moved = []
    judgement = []
    for now, sample in zip(after, batch, strict=True):
        moved.append(now["sampled"] - sample.generator_logprobs)
        judgement.append(sample.teacher_logprobs - sample.generator_logprobs)
    assert np.corrcoef(np.concatenate(moved), np.concatenate(judgement))[0, 1] > 0.3


def test_the_top_k_form_brings_the_student_to_its_teacher(student: Path, tmp_path: Path) -> None:
    teacher = learner(write_tiny(tmp_path, seed=1))
    found = learner(student, adv_tau=0.0, teacher_tau=1.0, teacher_top_k=4, optim={"lr": 1e-2})
    batch = samples(found, teacher, top_k=4)
    first, *_, last = (found.step(batch, 40)["loss_teacher"] for _ in range(40))
    assert last < 0.2 * first


def test_a_resumed_learner_continues_bit_for_bit(student: Path, tmp_path: Path) -> None:
    found = learner(student, optim={"warmup": 3, "schedule": "cosine", "weight_decay": 0.01})
    batch = samples(found)
    for _ in range(2):
        found.step(batch, 6)
    found.save_model(tmp_path)
    torch.save(found.state(), tmp_path / "trainer.pt")
    metrics = [found.step(batch, 6) for _ in range(3)]
    drawn = torch.rand(3)

    resumed = learner(tmp_path, optim={"warmup": 3, "schedule": "cosine", "weight_decay": 0.01})
    resumed.load_state(torch.load(tmp_path / "trainer.pt", weights_only=True))
    assert [resumed.step(batch, 6) for _ in range(3)] == metrics
    assert torch.equal(torch.rand(3), drawn)
    for name, weight in weights(found).items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_a_checkpoint_is_a_model_that_transformers_loads(student: Path, tmp_path: Path) -> None:
    found = learner(student)
    found.step(samples(found), 10)
    found.save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "sdpa")
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1
    for name, weight in weights(found).items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_what_is_saved_of_a_base_student_answers_and_ends_as_it_was_taught(
    student: Path, tmp_path: Path
) -> None:
    template = "{% for message in messages %}{{ message['content'] }}A{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    model = ModelSettings(chat_template=str(tmp_path / "chat.jinja"), end_tokens=("A", "B"))
    Learner(student, TrainerSettings(), CPU, model).save_model(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ends = tokenizer.convert_tokens_to_ids(["A", "B"])
    assert (tokenizer.chat_template, tokenizer.eos_token) == (template, "A")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.eos_token_id == [*ends, 1], "its own end comes last"


def test_what_is_published_is_the_cast_with_tied_weights_once(student: Path) -> None:
    found = learner(student, dtype="bfloat16")
    published = found.published_state()
    assert "lm_head.weight" not in published and "model.embed_tokens.weight" in published
    assert {weight.dtype for weight in published.values()} == {torch.bfloat16}
    assert set(published) == set(load_file(student / "model.safetensors"))
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}


def test_bfloat16_computes_near_float32_on_float32_masters(student: Path) -> None:
    exact = learner(student, type="sft")
    rough = learner(student, type="sft", dtype="bfloat16")
    batch = samples(exact)
    expected = gradient(exact, batch)
    found = gradient(rough, batch)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(expected, found, dim=0) > 0.99
    assert not torch.equal(expected, found)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_told(student: Path) -> None:
    found = learner(student, type="sft", optim={"max_grad_norm": 1e-3})
    batch = samples(found)
    norm = gradient(found, batch).norm().item()
    assert found.step(batch, 10)["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-3


def test_a_gradient_that_is_not_finite_stops_the_step_and_keeps_the_weights(student: Path) -> None:
    found = learner(student, teacher_tau=1.0, adv_tau=0.0)
    before = weights(found)
    batch = samples(found)
    for sample in batch:
        sample.teacher_logprobs = np.full(len(sample.loss_mask), -3e38, dtype=np.float32)
    with pytest.raises(UserError, match=r"the gradient norm of step 1 is (inf|nan)"):
        found.step(batch, 10)
    assert found.steps == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(found).items())


def flawed(**changes: Any) -> dict[str, Any]:
    return changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            flawed(generator_logprobs=np.full(3, np.nan, dtype=np.float32)),
            "generator_logprobs that are not finite",
        ),
        (flawed(teacher_logprobs=None), "no teacher_logprobs; expected 3"),
        (flawed(teacher_logprobs=np.zeros(2, dtype=np.float32)), "2 teacher_logprobs; expected 3"),
        (flawed(teacher_top_ids=None), "teacher_top_ids of shape None; expected \\(3, 2\\)"),
        (
            flawed(teacher_top_ids=np.array([[0, 1], [2, 3], [4, 48]], dtype=np.int32)),
            "teacher_top_ids 0 to 48; expected 0 to 47",
        ),
        (
            flawed(loss_mask=np.ones(4, dtype=np.uint8)),
            "loss mask of 4; expected its 3 completion tokens",
        ),
        (
            flawed(completion_ids=np.array([1, 2, VOCABULARY], dtype=np.int32)),
            "token ids 1 to 48; expected 0 to 47",
        ),
        (flawed(prompt_ids=np.array([], dtype=np.int32)), "0 prompt and 3 completion tokens"),
        (
            flawed(prompt_ids=np.array([3, -1, 2], dtype=np.int32)),
            "token ids -1 to 3; expected 0 to 47",
        ),
        (
            flawed(teacher_top_logprobs=np.array([[-1, -1], [-1, np.nan], [-1, -1]], np.float32)),
            "teacher_top_logprobs that are not finite",
        ),
        (
            flawed(teacher_tail_logprobs=np.array([-1, -np.inf, -1], dtype=np.float32)),
            "teacher_tail_logprobs that are not finite",
        ),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named_before_anything_changes(
    student: Path, changes: dict[str, Any], words: str
) -> None:
    found = learner(student, teacher_tau=1.0, teacher_top_k=2)
    zeros = np.zeros(3, dtype=np.float32)
    good = TrainSample(
        np.arange(4, dtype=np.int32),
        np.arange(3, dtype=np.int32),
        np.ones(3, dtype=np.uint8),
        zeros - 1,
        zeros - 1,
        np.zeros((3, 2), dtype=np.int32),
        np.full((3, 2), -1, dtype=np.float32),
        zeros - 1,
        group=7,
    )
    found.check(good)
    with pytest.raises(ValueError, match=f"a sample of group 7 has .*{words}"):
        found.step([replace(good, group=6), replace(copy.deepcopy(good), **changes)], 10)
    assert found.steps == 0


def test_a_step_without_a_token_to_train_on_is_refused(student: Path) -> None:
    found = learner(student)
    batch = [
        replace(sample, loss_mask=np.zeros_like(sample.loss_mask)) for sample in samples(found)
    ]
    with pytest.raises(ValueError, match="none of the 16 samples has a token in its loss mask"):
        found.step(batch, 10)


def test_the_metrics_of_a_step_are_those_of_metrics_jsonl(student: Path, tmp_path: Path) -> None:
    teacher = learner(write_tiny(tmp_path, seed=1))
    found = learner(student, teacher_tau=0.5, teacher_top_k=2)
    metrics = found.step(samples(found, teacher, top_k=2), 10)
    losses = {"loss", "loss_policy", "loss_teacher", "loss_kl"}
    mismatches = {
        f"mismatch_{name}" for name in ("mean", "max", "fresh_mean", "fresh_max", "by_staleness")
    }
    ratios = {"ratio_mean", "ratio_max", "masked_share", *mismatches}
    teachers = {"teacher_kl", "teacher_kl_k3", "teacher_top_k", "tail_floored_share"}
    assert set(metrics) == {*losses, *ratios, *teachers, "entropy", "grad_norm", "lr", "tokens"}
    assert {name for name, value in metrics.items() if value is None} == mismatches - {
        "mismatch_mean",
        "mismatch_max",
    }  # no version named
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)
    assert metrics["loss"] == pytest.approx(
        metrics["loss_policy"] + metrics["loss_teacher"] + metrics["loss_kl"], rel=1e-5
    )
    assert 0 < metrics["entropy"] < math.log(VOCABULARY)
