"""Combinations of settings, and the seed page's snippets."""

from __future__ import annotations

from pathlib import Path

import pytest

from settings.load import load_settings, resolve
from settings.rules import warnings_of

SNIPPETS = sorted((Path(__file__).parent.parent / "seed_page").glob("*.toml"))
TEACHER = ["deployment.num_teacher_gpus=1", "teacher_inference.model.name=big", "trainer.loss.teacher_tau=1"]


@pytest.mark.parametrize(
    ("overrides", "names", "words"),
    [
        (["trainer.loss.teacher_tau=0.5"], "deployment.num_teacher_gpus", "expected a teacher"),
        (["orchestrator.verification.enabled=false"], "orchestrator.verification.enabled", "rewards for the advantage"),
        ([*TEACHER, "orchestrator.verification.enabled=false"], "trainer.loss.adv_tau", "rewards for the advantage"),
        (["trainer.loss.adv_tau=0"], "trainer.loss.teacher_tau", "a teacher or rewards"),
        (['deployment.stages=["generate", "train"]'], "deployment.stages", "a teacher or rewards"),
        (["orchestrator.batch_size=100"], "orchestrator.batch_size", "Set orchestrator.batch_size = 96"),
        (["orchestrator.batch_size=3"], "orchestrator.group_size", "Set orchestrator.batch_size = 8"),
        (["orchestrator.group_size=1"], "orchestrator.group_size", "at least 2 rollouts"),
        (["inference.sampling.top_p=0.9"], "inference.sampling.top_p", "expected 1.0 in training"),
        (["inference.sampling.top_k=5"], "inference.sampling.top_k", "expected 0 in training"),
        (["inference.sampling.min_p=0.1"], "inference.sampling.min_p", "expected 0.0 in training"),
        ([*TEACHER, "inference.sampling.temperature=0.7"], "trainer.loss.teacher_top_k", "temperature 1 with the sampled"),
        (["trainer.loss.type=sft"], "trainer.loss.type", "no source of teacher completions"),
        (['deployment.stages=["train", "train", "generate", "verify"]'], "deployment.stages", "each stage once"),
        (["task.name=jsonl"], "task.path", "the file of the jsonl task"),
        (["task.path=a.jsonl"], "task.path", "only a jsonl task reads"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], names: str, words: str) -> None:
    [problem] = resolve(overrides=overrides, environ={}).problems
    assert names in problem.names
    assert words in str(problem)


@pytest.mark.parametrize(
    "overrides",
    [
        [*TEACHER, "inference.sampling.temperature=0.7", "trainer.loss.teacher_top_k=4"],
        ["inference.sampling.temperature=0.7"],
        [*TEACHER, "trainer.loss.adv_tau=0", "orchestrator.group_size=1"],
        [*TEACHER, 'deployment.stages=["generate", "score", "train"]'],
        ["task.name=jsonl", "task.path=a.jsonl", "task.eval_path=b.jsonl"],
    ],
)
def test_what_can_work_is_not(overrides: list[str]) -> None:
    assert resolve(overrides=overrides, environ={}).problems == []


def test_sft_with_a_soft_teacher_is_refused_as_well() -> None:
    problems = resolve(overrides=["trainer.loss.type=sft", *TEACHER], environ={}).problems
    assert "no teacher logprobs with sft" in str(problems[-1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher_inference.model.name=big"], "metric-only"),
        (["deployment.num_teacher_gpus=1", "trainer.loss.teacher_tau=1", "trainer.loss.adv_tau=0"], "nothing to learn"),
        (["trainer.loss.teacher_top_k=4"], "teacher_top_k = 4 has no effect"),
        ([*TEACHER, 'deployment.stages=["generate", "score", "train"]'], "adv_tau has no effect"),
        ([*TEACHER, 'deployment.stages=["generate", "verify", "train"]'], "onstream worker score"),
        (["deployment.generators=0"], "onstream worker generate"),
        (
            [
                *TEACHER,
                "trainer.loss.adv_tau=0",
                "orchestrator.verification.enabled=false",
                'deployment.stages=["generate", "verify", "score", "train"]',
            ],
            "deployment.stages names verify",
        ),
    ],
)
def test_what_may_not_be_meant_is_warned_about(overrides: list[str], words: str) -> None:
    [warning] = warnings_of(load_settings(overrides=overrides, environ={}))
    assert words in warning


def test_the_seed_page_has_its_snippets_here() -> None:
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_a_snippet_of_the_seed_page_checks_clean_as_printed(snippet: Path) -> None:
    assert resolve([snippet], environ={}).problems == []
