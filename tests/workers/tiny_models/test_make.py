from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onstream.pipeline.errors import UserError
from onstream.workers.tiny_models import make as make_module
from onstream.workers.tiny_models.fresh import ModelShape
from onstream.workers.tiny_models.make import make, with_mistakes
from onstream.workers.tiny_models.recipes import RECIPES
from onstream.workers.trainer.learner import TrainSample

TINY = ModelShape(hidden=32, layers=1, intermediate=32)


def sample(completion: list[int]) -> TrainSample:
    length = len(completion)
    return TrainSample(
        prompt_ids=np.array([5, 6], dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        loss_mask=np.ones(length, dtype=np.uint8),
        generator_logprobs=np.zeros(length, dtype=np.float32),
    )


def with_recipe(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    quick = replace(
        RECIPES["student"],
        shape=TINY,
        round_steps=2,
        eval_samples=8,
        batch_size=4,
        warmup_steps=0,
        **changes,
    )  # type: ignore[arg-type]
    monkeypatch.setitem(RECIPES, "student", quick)


def test_what_is_made_is_a_bfloat16_directory_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_recipe(monkeypatch, least=0.0, most=1.0)
    (made,) = make("reverse-text", tmp_path, only="student")
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert made.directory == tmp_path / "student" and made.steps == 2
    assert model.dtype == torch.bfloat16 and model.num_parameters() == made.parameters
    assert (
        model.generation_config.eos_token_id
        == AutoTokenizer.from_pretrained(made.directory).eos_token_id
    )


def test_the_same_seed_makes_the_same_model_and_another_seed_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_recipe(monkeypatch, least=0.0, most=1.0)
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make("reverse-text", tmp_path / name, seed=seed, only="student")
        weights.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_goal_that_is_not_met_is_an_error_that_says_how_far_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_recipe(monkeypatch, least=0.9, most=1.0, max_rounds=2)
    with pytest.raises(
        UserError,
        match=r"the student answers 0\.0% of the held-out problems of reverse-text after 4 steps",
    ):
        make("reverse-text", tmp_path, only="student")
    assert not (tmp_path / "student").exists()


def test_a_jump_past_the_goal_starts_again_at_half_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_recipe(monkeypatch, least=0.5, most=0.6, eval_interval=1, fine_eval_interval=1)
    shares = iter([0.9, 0.2, 0.55])
    rates = []
    monkeypatch.setattr(
        make_module, "evaluate", lambda directory, settings: {"exact": next(shares)}
    )
    made_settings = make_module._trainer_settings

    def noted(recipe, lr):  # type: ignore[no-untyped-def]
        rates.append(lr)
        return made_settings(recipe, lr)

    monkeypatch.setattr(make_module, "_trainer_settings", noted)
    (made,) = make("reverse-text", tmp_path, only="student")
    assert rates == [2e-3, 1e-3]
    assert (made.exact, made.steps) == (0.55, 3)


def test_mistakes_replace_letters_that_are_then_not_trained_on_and_never_the_end() -> None:
    samples = [sample([20 + letter] * 9 + [3]) for letter in range(64)]
    changed = with_mistakes(samples, 0.25, np.random.default_rng(0), end=3)
    differs = np.stack(
        [
            new.completion_ids != old.completion_ids
            for new, old in zip(changed, samples, strict=True)
        ]
    )
    masked = np.stack([new.loss_mask == 0 for new in changed])
    assert 0.15 < masked.mean() < 0.3
    assert not (differs & ~masked).any() and not masked[:, -1].any()
    assert {int(ids) for new in changed for ids in new.completion_ids[:-1]} <= set(range(20, 84))


def test_without_mistakes_samples_stay_as_they_are() -> None:
    (same,) = with_mistakes([sample([20, 21, 3])], 0.0, np.random.default_rng(0), end=3)
    assert same.completion_ids.tolist() == [20, 21, 3] and same.loss_mask.tolist() == [1, 1, 1]


def test_a_task_without_answers_cannot_make_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unanswered:
        held_out_size = 1

        def train(self, index: int) -> make_module.Problem:
            return make_module.Problem([{"role": "user", "content": "?"}], {})

    monkeypatch.setattr(make_module, "load_task", lambda settings: Unanswered())
    with pytest.raises(UserError, match="the ground truth to train on"):
        make("reverse-text", tmp_path)
