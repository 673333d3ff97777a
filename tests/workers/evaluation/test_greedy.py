"""Evaluation is greedy, on the held-out problems, and scored as the run's rollouts are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks import load_task
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.evaluation.greedy import evaluate
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE, character_tokenizer
from tests.models.families import tiny_model
from tests.workers.generator.conftest import plain_logprobs, student, student_dir

PICTURES = Path(__file__).parents[3] / "examples/colour-words"

__all__ = ["plain_logprobs", "student", "student_dir"]  # fixtures


def settings_of(samples: int = 6, **task: Any) -> Settings:
    sections = {
        "task": task,
        "eval": {"samples": samples},
        "deployment": {"device": "cpu"},
        "inference": {"max_batch": 4, "sampling": {"max_completion": 5, "temperature": 1.3}},
    }
    return Settings.model_validate(sections)


def likeliest(plain: Callable[..., Any], prompt: list[int]) -> str:
    """Five tokens, each the argmax of a plain forward pass, or fewer with an end among them."""
    tokenizer = character_tokenizer()
    ids = list[int]()
    while len(ids) < 5 and tokenizer.eos_token_id not in ids:
        ids.append(int(plain(np.array(prompt), np.array([*ids, 0]))[-1].argmax()))
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_answers_are_the_likeliest_ones_and_exact_counts_those_of_reward_one(
    student_dir: Path,
    plain_logprobs: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = settings_of()
    task = load_task(settings)
    tokenizer = character_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            task.held_out(i).messages, add_generation_prompt=True, return_dict=False
        )
        for i in range(6)
    ]
    answers = [likeliest(plain_logprobs, prompt) for prompt in prompts]
    (tmp_path / "half_right.py").write_text(
        f"def score(completion, info):\n    return float({answers[:3]!r}.count(completion) > 0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = evaluate(student_dir, settings_of(scorer="half_right:score"))
    expected = sum(answer in answers[:3] for answer in answers) / 6
    assert (result["exact"], result["reward"], result["samples"], result["unscored"]) == (
        expected,
        expected,
        6,
        0,
    )
    assert expected >= 0.5
    assert result["seconds"] > 0


def test_a_scorer_that_fails_leaves_problems_unscored_and_not_exact(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_scorer.py").write_text(
        "def score(completion, info):\n    raise KeyError('x')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = evaluate(student_dir, settings_of(scorer="broken_scorer:score"))
    assert (result["exact"], result["reward"], result["samples"], result["unscored"]) == (
        0.0,
        None,
        6,
        6,
    )


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_with_windows_answers_from_its_own_cache_whatever_engine_the_run_has(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma3_text", sliding_window=8, vocab_size=VOCABULARY_SIZE)
    model.save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)

    @torch.no_grad()
    def plain(prompt: Any, ids: Any) -> Any:
        row = torch.tensor([*prompt, *ids])[None]
        return model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].numpy()

    sections = settings_of().model_dump() | {"task": {"scorer": "expected:score"}}
    sections["inference"]["engine"] = engine
    settings = Settings.model_validate(sections)
    task = load_task(settings_of())
    answers = [
        likeliest(
            plain,
            tokenizer.apply_chat_template(
                task.held_out(index).messages, add_generation_prompt=True, return_dict=False
            ),
        )
        for index in range(6)
    ]
    (tmp_path / "expected.py").write_text(
        f"def score(completion, info):\n    return float(completion in {answers!r})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = evaluate(tmp_path, settings)
    assert (result["exact"], result["samples"], result["unscored"]) == (1.0, 6, 0)


@pytest.mark.parametrize(("model", "exact"), [("teacher", range(30, 33)), ("student", range(5))])
def test_with_the_images_swapped_a_model_that_looks_is_wrong_and_one_that_guesses_is_as_it_was(
    model: str, exact: range
) -> None:
    settings = load_settings(
        [PICTURES / "onstream.toml"], ["eval.samples=32", "eval.swap_images=true"], environ={}
    )
    result = evaluate(PICTURES / model, settings)
    assert result["exact"] * 32 in exact
    assert result["exact_swapped"] * 32 in range(2 if model == "teacher" else 5)
    assert (result["samples"], result["samples_swapped"]) == (32, 32)


def test_nothing_held_out_is_an_error(student_dir: Path) -> None:
    with pytest.raises(UserError, match="no held-out problems"):
        evaluate(student_dir, settings_of(samples=0))


def test_a_problem_longer_than_the_context_is_named(student_dir: Path) -> None:
    with pytest.raises(UserError, match=r"held-out problem 0: the prompt has .* tokens"):
        evaluate(student_dir, settings_of(args={"min_length": 90, "max_length": 90}))
