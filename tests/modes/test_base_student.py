"""A base student under an instruct teacher: it has no chat template, and an end of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.tasks import load_task
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.student import load_student
from tests.base_student import make_base
from tests.modes.run import ROOT, STUDENT, TEACHER, Run

IM_END = 3
PROMPTS = 64

pytestmark = pytest.mark.slow


def ended(directory: Path, settings: Settings) -> float:
    """The share of answers of the model in `directory` that end with the teacher's end of turn."""
    student = load_student(directory, settings)
    task = load_task(settings)
    prompts = [student.prompt(task.held_out(index).messages).ids for index in range(PROMPTS)]
    student.engine.add(
        [
            GenerationRequest(key, ids, max_tokens=16, seed=0, temperature=0.0)
            for key, ids in enumerate(prompts)
        ]
    )
    written = []
    while student.engine.active:
        written += student.engine.step()
    student.engine.close()
    assert len(written) == PROMPTS
    return sum(one.token_ids[-1] == IM_END for one in written) / PROMPTS


def test_a_base_student_learns_to_answer_and_to_end_as_its_instruct_teacher(
    tmp_path: Path,
) -> None:
    base = make_base(STUDENT, tmp_path / "base")
    run = Run(
        tmp_path,
        ROOT / "examples/reverse-text/onstream.toml",
        f"model.name={base}",
        f"model.chat_template={TEACHER}",
        'model.end_tokens=["<|im_end|>"]',
        f"eval.samples={PROMPTS}",
        "trainer.max_steps=30",
        "orchestrator.batch_size=64",
    )
    settings = load_settings(run.files, overrides=run.sets[1::2], environ={})
    assert ended(base, settings) < 0.5, "it ends with a token of its own"
    run.up()
    policy = run.directory / "policies/000030"
    (before, after) = run.rows("evals.jsonl")
    metrics = run.rows("metrics.jsonl")
    print(f"exact {before['exact']:.3f} -> {after['exact']:.3f}, ended {ended(policy, settings)}")
    assert ended(policy, settings) > 0.9
    assert after["exact"] > before["exact"]
    last = sum(row["teacher_kl"] for row in metrics[-5:]) / 5
    assert last < 0.75 * metrics[0]["teacher_kl"]
    audit = run.audit()
    assert (audit["lost"], audit["duplicated"], audit["dead"]) == (0, 0, 0)
